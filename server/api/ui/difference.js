// How far two pictures of one size are apart, in pixels and in decibels.

async function pixels(url) {
  const image = new Image();
  image.src = url;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = image.naturalWidth;
  canvas.height = image.naturalHeight;
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.drawImage(image, 0, 0);
  return context.getImageData(0, 0, canvas.width, canvas.height);
}

/**
 * Compares two pictures channel by channel, 0 to 255.
 * Gives {psnr in dB (Infinity when equal), largest, mean, canvas of the difference times `gain`},
 * or null if their sizes differ.
 */
export async function difference(urlA, urlB, gain = 4) {
  const [a, b] = await Promise.all([pixels(urlA), pixels(urlB)]);
  if (a.width !== b.width || a.height !== b.height) return null;
  const shown = new ImageData(a.width, a.height);
  let squares = 0;
  let sum = 0;
  let largest = 0;
  for (let at = 0; at < a.data.length; at += 4) {
    for (let channel = 0; channel < 3; channel++) {
      const apart = Math.abs(a.data[at + channel] - b.data[at + channel]);
      squares += apart * apart;
      sum += apart;
      largest = Math.max(largest, apart);
      shown.data[at + channel] = apart * gain;
    }
    shown.data[at + 3] = 255;
  }
  const count = a.width * a.height * 3;
  const psnr = squares === 0 ? Infinity : 10 * Math.log10((255 * 255 * count) / squares);
  const canvas = document.createElement("canvas");
  canvas.width = a.width;
  canvas.height = a.height;
  canvas.getContext("2d").putImageData(shown, 0, 0);
  return { psnr, largest, mean: sum / count, canvas };
}
