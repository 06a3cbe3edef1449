// The history as a row of small pictures: click, arrow keys, Delete.
import { $, el, show } from "./dom.js";
import { history } from "./history.js";

const MOVES = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 };

let current = null;

const buttons = () => [...$("history-list").querySelectorAll(".entry")];

function describe(entry) {
  const { body, status } = entry;
  const ending = status === "succeeded" ? "" : `, ${status}`;
  return `${body.prompt}, seed ${body.seed}${ending}`;
}

function item(entry, index, { onOpen, onRemove }) {
  const inside = entry.thumb
    ? el("img", { src: entry.thumb, alt: "" })
    : el("span", { textContent: entry.status === "succeeded" ? entry.body.prompt : entry.status });
  const button = el("button", {
    type: "button", className: "entry", tabIndex: index === 0 ? 0 : -1, title: entry.body.prompt,
    data: { id: entry.id }, attrs: { "aria-label": describe(entry), "aria-keyshortcuts": "Delete" },
  }, inside);
  if (entry.id === current) button.setAttribute("aria-current", "true");
  button.addEventListener("click", () => onOpen(entry.id));
  const cross = el("button", {
    type: "button", className: "remove", tabIndex: -1, textContent: "×",
    attrs: { "aria-label": `Remove ${describe(entry)}` },
  });
  cross.addEventListener("click", () => onRemove(entry.id));
  const many = entry.images?.length > 1
    ? el("span", { className: "count-badge", textContent: `${entry.images.length}`, attrs: { "aria-hidden": "true" } })
    : null;
  return el("li", {}, button, cross, many);
}

/** Draws the list; `handlers` are {onOpen, onRemove}, both with an id. */
export function drawHistory(handlers, now = current) {
  current = now;
  const focused = document.activeElement?.closest?.(".history .entry")?.dataset.id;
  const entries = history();
  $("history-list").replaceChildren(...entries.map((entry, index) => item(entry, index, handlers)));
  show($("history-empty"), entries.length === 0);
  show($("history-clear"), entries.length > 0);
  if (focused) buttons().find((button) => button.dataset.id === focused)?.focus();
}

function moveTo(button) {
  if (!button) return;
  for (const other of buttons()) other.tabIndex = other === button ? 0 : -1;
  button.focus();
}

export function wireHistory({ onRemove }) {
  $("history-list").addEventListener("keydown", (event) => {
    const all = buttons();
    const at = all.indexOf(event.target);
    if (at < 0) return;
    if (event.key in MOVES) moveTo(all[at + MOVES[event.key]]);
    else if (event.key === "Home") moveTo(all[0]);
    else if (event.key === "End") moveTo(all.at(-1));
    else if (event.key === "Delete") {
      onRemove(event.target.dataset.id);
      moveTo(buttons()[Math.min(at, buttons().length - 1)]);
    } else return;
    event.preventDefault();
  });
}
