// Before the first paint: the theme chosen earlier, so that the page does not flash in the other.
"use strict";

try {
  const theme = localStorage.getItem("lumina.theme");
  if (theme === "light" || theme === "dark") document.documentElement.dataset.theme = theme;
} catch {
  // Without storage the system's theme holds.
}
