// The problems of a request, each at the field that it names.
import { $, el, show } from "./dom.js";

const holder = (name) => document.querySelector(`[data-field="${CSS.escape(name)}"]`);

/** The controls that a field's problem belongs to. */
function controls(name) {
  const direct = $(name);
  if (direct && direct.matches("input, select, textarea")) return [direct];
  return [...(holder(name)?.querySelectorAll("input, select, textarea") ?? [])];
}

export function clearProblems() {
  for (const note of document.querySelectorAll(".field-problem")) note.remove();
  for (const control of document.querySelectorAll("[aria-invalid]")) {
    control.removeAttribute("aria-invalid");
    control.removeAttribute("aria-describedby");
  }
}

/** Shows [{field, detail}] beside their fields and goes to the first; returns what has no field. */
export function showProblems(problems) {
  const homeless = [];
  let first = null;
  for (const { field, detail } of problems) {
    const place = holder(field);
    const inputs = controls(field).filter((control) => control.type !== "range");
    if (!place || inputs.length === 0) {
      homeless.push(detail);
      continue;
    }
    const note = el("p", { className: "error field-problem", id: `${field}-problem`, textContent: detail });
    place.append(note);
    for (const control of inputs) {
      control.setAttribute("aria-invalid", "true");
      control.setAttribute("aria-describedby", note.id);
    }
    const fold = place.closest("details");
    if (fold) fold.open = true;
    first ??= inputs.find((control) => !control.closest("[hidden]")) ?? null;
  }
  first?.focus();
  return homeless;
}

export function showAlert(text) {
  $("alert").textContent = text;
  show($("alert"), Boolean(text));
}

/** Problems of our own: numbers that are none, which a browser hides from the body. */
export function unreadable(form) {
  return [...form.querySelectorAll('input[type="number"]')]
    .filter((input) => !input.closest("[hidden]") && input.validity.badInput)
    .map((input) => {
      const field = input.closest("[data-field]")?.dataset.field ?? input.id;
      return { field, detail: `${field} must be a number` };
    });
}
