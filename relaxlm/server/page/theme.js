// Automatic, light or dark. The colours themselves are in base.css.

import { byId, h, icon } from "./dom.js";

const THEMES = [
  { name: "", label: "Theme: auto", icon: "auto" },
  { name: "light", label: "Theme: light", icon: "sun" },
  { name: "dark", label: "Theme: dark", icon: "moon" },
];
const STORED = "relaxlm.theme";

export function startTheme() {
  const root = document.documentElement;
  const button = byId("theme");
  const system = matchMedia("(prefers-color-scheme: dark)");
  const apply = (name) => {
    const theme = THEMES.find((one) => one.name === name) ?? THEMES[0];
    if (theme.name) root.dataset.theme = theme.name;
    else delete root.dataset.theme;
    button.replaceChildren(icon(theme.icon), h("span", {}, theme.label));
    colorBrowser();
  };
  button.addEventListener("click", () => {
    const current = THEMES.findIndex((one) => one.name === (root.dataset.theme ?? ""));
    const next = THEMES[(current + 1) % THEMES.length].name;
    try {
      localStorage.setItem(STORED, next);
    } catch {
      // Storage is switched off: the choice lasts as long as the page.
    }
    apply(next);
  });
  system.addEventListener("change", colorBrowser);
  apply(root.dataset.theme ?? "");
}

/** The bar of a phone's browser takes the colour of the page. */
function colorBrowser() {
  const color = getComputedStyle(document.body).backgroundColor;
  document.querySelector("meta[name=theme-color]").content = color;
}
