// Width and height: what the checkpoint allows, and shapes of about the same area.
import { $, el } from "./dom.js";
import { fallback } from "./offer.js";

const RATIOS = [[1, 1], [4, 3], [3, 4], [16, 9], [9, 16]];

let limits = null;

const side = (id) => Number($(id).value || fallback(id, $("preset").value) || 0);

/** The allowed size that comes nearest to a ratio, with about `area` pixels. */
export function sizeFor([across, down], area, { min_size: min, max_size: max, size_multiple: step }) {
  let best = null;
  for (let width = min; width <= max; width += step) {
    for (let height = min; height <= max; height += step) {
      const shape = Math.abs(Math.log((width / height) * (down / across)));
      const size = Math.abs(Math.log((width * height) / area));
      const miss = 3 * shape + size;
      if (!best || miss < best.miss - 1e-9) best = { width, height, miss };
    }
  }
  return best;
}

export function offerSizes(given) {
  limits = given;
  for (const id of ["width", "height"]) {
    Object.assign($(id), { min: given.min_size, max: given.max_size, step: given.size_multiple });
    $(id).title = `${given.min_size} to ${given.max_size}, in steps of ${given.size_multiple}`;
  }
  $("ratios").replaceChildren(...RATIOS.map(([across, down]) => {
    const shape = el("i");
    const unit = 20 / Math.max(across, down);
    shape.style.width = `${across * unit}px`;
    shape.style.height = `${down * unit}px`;
    return el(
      "button",
      { type: "button", data: { ratio: `${across}:${down}` }, attrs: { "aria-pressed": "false" } },
      el("span", { className: "shape" }, shape), `${across}:${down}`,
    );
  }));
}

/** Marks the shape that the form's size has. */
export function showRatio() {
  if (!limits) return;
  const [width, height] = [side("width"), side("height")];
  for (const [index, button] of [...$("ratios").children].entries()) {
    const fit = sizeFor(RATIOS[index], width * height, limits);
    const first = [...$("ratios").children].slice(0, index).some((other) => other.ariaPressed === "true");
    button.setAttribute("aria-pressed", `${!first && fit?.width === width && fit?.height === height}`);
  }
}

export function wireSizes(onChange) {
  $("ratios").addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    const ratio = button.dataset.ratio.split(":").map(Number);
    const area = Math.max(side("width") * side("height"), 1);
    const { width, height } = sizeFor(ratio, area, limits);
    Object.assign($("width"), { value: width });
    Object.assign($("height"), { value: height });
    onChange();
  });
  $("swap").addEventListener("click", () => {
    const [width, height] = [side("width"), side("height")];
    if (width) $("height").value = width;
    if (height) $("width").value = height;
    onChange();
  });
}
