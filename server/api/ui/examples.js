// Prompts to begin with, in the languages that models of this family read.
import { $, el } from "./dom.js";

const EXAMPLES = [
  ["en", "English", "a red circle above a blue square"],
  ["en", "English", "three yellow stars"],
  ["de", "Deutsch", "ein roter Kreis über einem blauen Quadrat"],
  ["zh", "中文", "一个红色圆形在一个蓝色正方形上面"],
  ["ja", "日本語", "青い正方形の上に赤い円"],
  ["ru", "Русский", "красный круг над синим квадратом"],
];

/** Buttons that put an example in the prompt. */
export function addExamples(onChoose) {
  let last = "";
  for (const [lang, language, text] of EXAMPLES) {
    const name = language === last ? "…" : language;
    last = language;
    const button = el("button", {
      type: "button", textContent: name === "…" ? "another" : name, title: text, lang,
      attrs: { "aria-label": `${language}: ${text}` },
    });
    button.addEventListener("click", () => onChoose(text));
    $("examples").append(button);
  }
}
