// The API key: asked for when the service wants one, kept in this browser.
import { $, show } from "./dom.js";
import { askForKey, hasKey, setKey } from "./http.js";

function open(problem) {
  show($("key-open"), true);
  $("key-error").textContent = hasKey() && problem ? problem.message : "";
  show($("key-error"), Boolean($("key-error").textContent));
  if (!$("key").open) $("key").showModal();
}

/** `onKey` is called when there is a new key to try. */
export function wireKey(onKey) {
  let asked = false; // once per key: a reader who closes the dialog is left alone
  askForKey((problem) => {
    show($("key-open"), true);
    if (asked) return;
    asked = true;
    open(problem);
  });
  show($("key-open"), hasKey());
  $("key-open").addEventListener("click", () => open(null));
  $("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    setKey($("key-text").value.trim());
    $("key-text").value = "";
    asked = false;
    $("key").close();
    onKey();
  });
  $("key-forget").addEventListener("click", () => {
    setKey("");
    $("key").close();
  });
}
