// One finished picture: the image itself, or what is left of it.
import { el } from "./dom.js";

const SMALL = 320; // pictures below this many pixels are enlarged with their edges kept sharp

export const fileName = (image, format) => `lumina-${image.seed}.${format === "jpeg" ? "jpg" : (format ?? "png")}`;

/** An image element; where the picture is gone, its thumbnail and a sentence take its place. */
export function picture(image, { prompt, thumb = null }) {
  const small = Math.max(image.width, image.height) < SMALL;
  const node = el("img", {
    src: image.url, alt: prompt, width: image.width, height: image.height, className: small ? "small" : "",
  });
  node.addEventListener("error", () => {
    const left = el("div", { className: "gone" });
    if (thumb) left.append(el("img", { src: thumb, alt: prompt, className: "small" }));
    left.append(el("p", { textContent: "This picture has expired. Generate draws it again." }));
    node.replaceWith(left);
  });
  return node;
}

/** A small copy of a picture for the history, as a data address; null if it cannot be read. */
export async function thumbnail(url) {
  const image = new Image();
  image.src = url;
  try {
    await image.decode();
  } catch {
    return null;
  }
  const scale = Math.min(1, 112 / Math.max(image.naturalWidth, image.naturalHeight));
  const canvas = el("canvas", {
    width: Math.round(image.naturalWidth * scale), height: Math.round(image.naturalHeight * scale),
  });
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL("image/webp", 0.85);
}
