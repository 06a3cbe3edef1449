// Light, dark, or as the system has it.
import { $ } from "./dom.js";
import { say } from "./progress.js";

const NEXT = { system: "light", light: "dark", dark: "system" };

const current = () => document.documentElement.dataset.theme ?? "system";

function name() {
  $("theme").setAttribute("aria-label", `Theme: ${current()}. Change to ${NEXT[current()]}`);
  $("theme").title = `Theme: ${current()}`;
}

export function wireTheme() {
  name();
  $("theme").addEventListener("click", () => {
    const theme = NEXT[current()];
    if (theme === "system") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    try {
      if (theme === "system") localStorage.removeItem("lumina.theme");
      else localStorage.setItem("lumina.theme", theme);
    } catch {
      // It holds for this visit.
    }
    name();
    say(`Theme: ${theme}`);
  });
}
