// The page itself: colours, sections, recipes, and the start of all of it.
const $ = (id) => document.getElementById(id);

/** An element with text that is never read as markup. */
function make(tag, cls, ...children) {
  const node = document.createElement(tag);
  if (cls) node.className = cls;
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}

function themes() {
  const button = $("theme");
  const order = ["auto", "light", "dark"];
  const words = { auto: "as the system has them", light: "light", dark: "dark" };
  let kept = null;
  try {
    kept = localStorage.getItem("llmalign-theme");
  } catch {
    kept = null; // a page that was opened from a file may keep nothing
  }
  const show = (theme) => {
    if (theme === "auto") delete document.documentElement.dataset.theme;
    else document.documentElement.dataset.theme = theme;
    button.textContent = `Theme: ${theme}`;
    button.setAttribute("aria-label", `Colours: ${words[theme]}`);
    try {
      localStorage.setItem("llmalign-theme", theme);
    } catch {
      /* chosen for this visit alone */
    }
  };
  let now = order.includes(kept) ? kept : "auto";
  button.hidden = false;
  button.addEventListener("click", () => {
    now = order[(order.indexOf(now) + 1) % order.length];
    show(now);
  });
  show(now);
}

function sections() {
  const links = new Map([...document.querySelectorAll(".top nav a")].map((link) => [link.hash.slice(1), link]));
  const seen = new Set();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) entry.isIntersecting ? seen.add(entry.target.id) : seen.delete(entry.target.id);
    const first = [...links.keys()].find((name) => seen.has(name));
    for (const [name, link] of links) {
      name === first ? link.setAttribute("aria-current", "true") : link.removeAttribute("aria-current");
    }
  }, { rootMargin: "-25% 0px -60% 0px" });
  for (const name of links.keys()) watcher.observe($(name));
}

function recipes() {
  const search = $("recipe-search");
  if (!search) return;
  const rows = [...document.querySelectorAll(".recipe tbody tr")].map((row) => [row, row.textContent.toLowerCase()]);
  const folds = [...document.querySelectorAll(".manifests details")];
  const before = new Map();
  search.addEventListener("input", () => {
    const wanted = search.value.trim().toLowerCase();
    if (wanted && !before.size) folds.forEach((fold) => before.set(fold, fold.open));
    for (const [row, text] of rows) row.hidden = Boolean(wanted) && !text.includes(wanted);
    for (const fold of folds) {
      const held = [...fold.querySelectorAll(".recipe tbody tr")];
      fold.open = wanted ? held.some((row) => !row.hidden) : before.get(fold) ?? fold.open;
    }
    if (!wanted) before.clear();
  });
}

themes();
sections();
charts();
recipes();
browse().then(() => {
  document.documentElement.dataset.ready = "true";
  performance.mark("ready");
});
