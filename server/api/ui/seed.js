// The seed: empty draws a new one each time; a number in the field is kept.
import { $ } from "./dom.js";

const MAX_SEED = 2 ** 53 - 9;

let last = null; // of the newest picture

/** A random seed that JSON carries exactly. */
export function newSeed() {
  const [high, low] = crypto.getRandomValues(new Uint32Array(2));
  return ((high & 0x1fffff) * 2 ** 32 + low) % MAX_SEED;
}

export function rememberSeed(seed) {
  last = seed;
  $("seed").placeholder = `random · last ${seed}`;
}

export function wireSeed(onChange) {
  $("dice").addEventListener("click", () => {
    $("seed").value = newSeed();
    onChange();
  });
  $("lock").addEventListener("click", () => {
    $("seed").value = $("seed").value === "" ? (last ?? newSeed()) : "";
    onChange();
  });
}
