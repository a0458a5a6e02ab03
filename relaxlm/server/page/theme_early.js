// The chosen theme, before anything is drawn: as a module it would come after a flash of the other.
try {
  const theme = localStorage.getItem("relaxlm.theme");
  if (theme) document.documentElement.dataset.theme = theme;
} catch {
  // Storage is switched off: the browser's own preference holds.
}
