"use strict";
// Everything is there without this; it only leaves cards out and closes what was enlarged.
for (const bar of document.querySelectorAll(".filter")) {
  bar.hidden = false;
  bar.addEventListener("click", (event) => {
    const button = event.target.closest("button");
    if (!button) return;
    for (const other of bar.querySelectorAll("button")) other.setAttribute("aria-pressed", String(other === button));
    for (const card of document.querySelectorAll(".card")) {
      card.hidden = button.value !== "" && !JSON.parse(card.dataset.tags).includes(button.value);
    }
  });
}
addEventListener("keydown", (event) => {
  if (event.key !== "Escape") return;
  for (const open of document.querySelectorAll(".zoom[open]")) open.open = false;
});
