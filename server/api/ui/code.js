// The dialog that shows a request as a program.
import { $, chosen, sleep } from "./dom.js";
import { hasKey } from "./http.js";
import { curl, python } from "./snippets.js";

const WRITERS = { curl, python };

let body = {};

function write() {
  const writer = WRITERS[chosen($("code-language"))];
  $("code-text").textContent = writer(body, { origin: location.origin, withKey: hasKey() });
}

export function openCode(entry) {
  body = entry.body;
  write();
  $("code").showModal();
}

async function copy() {
  const text = $("code-text").textContent;
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    // Pages without TLS may not use the clipboard: the text is selected for the reader to copy.
    getSelection().selectAllChildren($("code-text"));
    $("code-copy").textContent = "Selected: copy it now";
    return;
  }
  $("code-copy").textContent = "Copied";
  await sleep(1500);
  $("code-copy").textContent = "Copy";
}

export function wireCode() {
  $("code-language").addEventListener("change", write);
  $("code-copy").addEventListener("click", copy);
}
