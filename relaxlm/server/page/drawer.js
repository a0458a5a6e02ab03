// The list beside the messages: a column where there is room, else a drawer over them.

import { byId } from "./dom.js";

const NARROW = matchMedia("(max-width: 52rem)"); // as in layout.css
const STORED = "relaxlm.sidebar";

export function startDrawer() {
  const opener = byId("open-sidebar");
  opener.addEventListener("click", toggleSidebar);
  byId("close-sidebar").addEventListener("click", closeDrawer);
  byId("backdrop").addEventListener("click", closeDrawer);
  NARROW.addEventListener("change", () => {
    closeDrawer();
    describe();
  });
  try {
    document.body.classList.toggle("sidebar-closed", localStorage.getItem(STORED) === "closed");
  } catch {
    // Storage is switched off: the list starts open.
  }
  describe();
}

/** Makes the list visible, wherever it is. */
export function openSidebar() {
  if (NARROW.matches) setDrawer(true);
  else setColumn(true);
}

export function toggleSidebar() {
  const { classList } = document.body;
  if (NARROW.matches) setDrawer(!classList.contains("drawer-open"));
  else setColumn(classList.contains("sidebar-closed"));
}

/** True if there was a drawer to close. */
export function closeDrawer() {
  const open = document.body.classList.contains("drawer-open");
  if (open) setDrawer(false);
  return open;
}

function setDrawer(open) {
  document.body.classList.toggle("drawer-open", open);
  byId("backdrop").hidden = !open;
  byId("main").inert = open;
  describe();
  (open ? byId("new-conversation") : byId("open-sidebar")).focus();
}

function setColumn(open) {
  document.body.classList.toggle("sidebar-closed", !open);
  try {
    localStorage.setItem(STORED, open ? "open" : "closed");
  } catch {
    // Storage is switched off: remembered until the page is left.
  }
  describe();
}

function describe() {
  const { classList } = document.body;
  const shown = NARROW.matches ? classList.contains("drawer-open") : !classList.contains("sidebar-closed");
  byId("open-sidebar").setAttribute("aria-expanded", String(shown));
}
