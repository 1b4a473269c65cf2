// The browser of outputs: unpacked, searched, ordered and shown, always as text.
async function unpack(text) {
  const bytes = Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).json();
}

const PAGE = 25;
const KINDS = { win: "wins", loss: "loses", tie: "tie", none: "not judged" };
const kindOf = (p) => (p === null ? "none" : p > 1.5 ? "win" : p < 1.5 ? "loss" : "tie");

/** Rows of all runs by instruction: an item is one instruction with an answer of each run that has one. */
function itemsOf(data) {
  const items = [], known = new Map();
  data.runs.forEach((run, place) => {
    const times = new Map(); // an instruction that comes twice in a run is two items
    for (const [prompt, reference, output, p, dataset, judge, long1, long2] of run.rows) {
      const time = times.get(prompt) ?? 0;
      times.set(prompt, time + 1);
      const key = `${prompt} ${time}`;
      if (!known.has(key)) {
        known.set(key, { prompt, number: items.length + 1, dataset, answers: [] });
        items.push(known.get(key));
      }
      known.get(key).answers.push({ run: place, reference, output, p, judge, long1, long2, kind: kindOf(p) });
    }
  });
  return items;
}

const SORTS = {
  longest: (answers) => -Math.max(...answers.map((one) => one.long2)),
  shortest: (answers) => Math.min(...answers.map((one) => one.long2)),
  longer: (answers) => -Math.max(...answers.map((one) => one.long2 - one.long1)),
  best: (answers) => -Math.max(...answers.map((one) => one.p ?? -1)),
  worst: (answers) => Math.min(...answers.map((one) => one.p ?? 9)),
};

class Browser {
  constructor(data) {
    this.texts = data.texts;
    this.runs = data.runs;
    this.items = itemsOf(data);
    this.page = 0;
    this.shown = [];
    this.lower = new Map();
    for (const name of new Set(this.items.map((item) => item.dataset).filter((name) => name !== null))) {
      const choice = make("option", "", name);
      choice.value = name;
      $("dataset").append(choice);
    }
    $("dataset").closest("label").hidden = $("dataset").options.length < 3;
    let waiting = 0;
    $("search").addEventListener("input", () => {
      clearTimeout(waiting);
      waiting = setTimeout(() => this.find(), 120);
    });
    for (const name of ["run", "kind", "dataset", "sort"]) $(name).addEventListener("change", () => this.find());
    $("controls").addEventListener("submit", (event) => event.preventDefault());
    document.addEventListener("keydown", (event) => this.key(event));
    this.find();
  }

  text(number) {
    return this.texts[number];
  }

  has(number, words) {
    if (!this.lower.has(number)) this.lower.set(number, this.texts[number].toLowerCase());
    const text = this.lower.get(number);
    return words.filter((word) => text.includes(word));
  }

  answersOf(item, run) {
    return run < 0 ? item.answers : item.answers.filter((one) => one.run === run);
  }

  matches(item, run, kind, words) {
    const answers = this.answersOf(item, run);
    if (!answers.length) return false;
    if (kind === "differ" && new Set(item.answers.map((one) => one.kind)).size < 2) return false;
    if (kind && kind !== "differ" && !answers.some((one) => one.kind === kind)) return false;
    const found = new Set(this.has(item.prompt, words));
    for (const one of answers) {
      if (found.size === words.length) break;
      for (const number of [one.output, one.reference]) this.has(number, words).forEach((word) => found.add(word));
    }
    return found.size === words.length;
  }

  find() {
    this.run = Number($("run").value);
    this.words = [...new Set($("search").value.toLowerCase().split(/\s+/).filter(Boolean))].sort((a, b) => b.length - a.length);
    const kind = $("kind").value, dataset = $("dataset").value, sort = SORTS[$("sort").value];
    this.shown = this.items.filter((item) =>
      (!dataset || item.dataset === dataset) && this.matches(item, this.run, kind, this.words));
    if (sort) {
      const keys = new Map(this.shown.map((item) => [item, sort(this.answersOf(item, this.run))]));
      this.shown.sort((a, b) => keys.get(a) - keys.get(b) || a.number - b.number);
    }
    const escaped = this.words.map((word) => word.replace(/[.*+?^${}()|[\]\\]/g, "\\$&"));
    this.pattern = escaped.length ? new RegExp(`(${escaped.join("|")})`, "giu") : null;
    this.turn(0);
  }

  turn(page) {
    const pages = Math.max(1, Math.ceil(this.shown.length / PAGE));
    this.page = Math.max(0, Math.min(page, pages - 1));
    const first = this.page * PAGE, part = this.shown.slice(first, first + PAGE);
    const all = this.items.length.toLocaleString("en"), count = this.shown.length.toLocaleString("en");
    $("count").textContent = this.shown.length
      ? `${count} of ${all} prompts, ${first + 1} to ${first + part.length} shown`
      : `None of ${all} prompts fits. Fewer words, or another outcome, would.`;
    $("list").replaceChildren(...part.map((item) => this.card(item)));
    for (const text of $("list").querySelectorAll(".text")) {
      if (text.classList.contains("short") && text.scrollHeight <= text.clientHeight + 2) text.nextElementSibling?.remove();
    }
    const button = (words, to, off) => {
      const node = make("button", "", words);
      node.type = "button";
      node.disabled = off;
      node.addEventListener("click", () => {
        this.turn(to);
        this.focus(0);
      });
      return node;
    };
    $("pages").hidden = pages < 2;
    $("pages").replaceChildren(
      button("First", 0, this.page === 0), button("Back", this.page - 1, this.page === 0),
      make("span", "", `page ${this.page + 1} of ${pages}`),
      button("On", this.page + 1, this.page === pages - 1), button("Last", pages - 1, this.page === pages - 1));
  }

  marked(number) {
    const text = this.text(number);
    if (!this.pattern) return [text];
    return text.split(this.pattern).map((part, place) => (place % 2 ? make("mark", "", part) : part));
  }

  card(item) {
    const answers = this.answersOf(item, this.run);
    const node = make("article", "row");
    node.tabIndex = -1;
    node.setAttribute("aria-label", `Prompt ${item.number}`);
    node.append(make("header", "", make("span", "", `#${item.number}`), item.dataset === null ? null : make("span", "", item.dataset)));
    node.append(make("p", "prompt", ...this.marked(item.prompt)));
    const sides = make("div", "sides");
    for (const number of new Set(answers.map((one) => one.reference))) {
      const one = answers.find((own) => own.reference === number);
      sides.append(this.answer(this.runs[one.run].reference, "answer", number, one.long1, null));
    }
    for (const one of answers) {
      const run = this.runs[one.run];
      sides.append(this.answer(run.name, `answer s${run.colour}`, one.output, one.long2, one));
    }
    node.append(sides);
    return node;
  }

  answer(name, cls, number, length, judged) {
    const head = make("h4", "", name);
    if (judged) {
      const sure = judged.p === null ? "" : ` (${(100 * (judged.p - 1)).toFixed(0)} %)`;
      const said = make("span", judged.kind, KINDS[judged.kind] + sure);
      said.title = judged.judge === null ? "how far it is preferred to the reference" : `as ${judged.judge} says`;
      head.append(said);
    }
    head.append(make("span", "", `${length.toLocaleString("en")} characters`));
    if (!this.text(number)) return make("div", cls, head, make("p", "nothing", "an empty answer"));
    // What was searched for is seen, even far down.
    const first = this.pattern ? this.text(number).search(this.pattern) : -1;
    const open = first > 450;
    const text = make("div", open ? "text" : "text short", ...this.marked(number));
    const more = make("button", "", open ? "Show less" : "Show all");
    more.type = "button";
    more.setAttribute("aria-expanded", String(open));
    more.addEventListener("click", () => {
      const short = text.classList.toggle("short");
      more.textContent = short ? "Show all" : "Show less";
      more.setAttribute("aria-expanded", String(!short));
    });
    return make("div", cls, head, text, more);
  }

  focus(place) {
    const rows = $("list").children;
    if (!rows.length) return;
    const row = rows[Math.max(0, Math.min(place, rows.length - 1))];
    row.focus({ preventScroll: true });
    row.scrollIntoView({ block: "start" });
  }

  key(event) {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const inside = event.target.closest?.("input, select, textarea");
    if (event.key === "Escape" && event.target === $("search")) {
      $("search").value = "";
      this.find();
      $("search").blur();
      return;
    }
    if (event.key === "Enter" && event.target === $("search")) return this.focus(0);
    if (inside) return;
    const rows = [...$("list").children];
    const now = rows.indexOf(document.activeElement?.closest?.(".row"));
    const move = {
      "/": () => { $("search").focus(); $("search").select(); },
      j: () => {
        if (now === rows.length - 1 && (this.page + 1) * PAGE < this.shown.length) {
          this.turn(this.page + 1);
          this.focus(0);
        } else this.focus(now + 1);
      },
      k: () => {
        if (now === 0 && this.page > 0) {
          this.turn(this.page - 1);
          this.focus(PAGE - 1);
        } else this.focus(now < 0 ? 0 : now - 1);
      },
      o: () => rows[now]?.querySelectorAll(".answer button").forEach((button) => button.click()),
      "]": () => { this.turn(this.page + 1); this.focus(0); },
      "[": () => { this.turn(this.page - 1); this.focus(0); },
    }[event.key];
    if (!move) return;
    event.preventDefault();
    move();
  }
}

async function browse() {
  const block = $("outputs-data");
  if (!block) return;
  if (!("DecompressionStream" in window)) {
    $("count").textContent = "The outputs are packed, and this browser cannot unpack them (it has no DecompressionStream): "
      + "Chrome and Edge from 86, Firefox from 113 and Safari from 16.4 can. All the rest of this page is here.";
    $("controls").hidden = true;
    return;
  }
  try {
    new Browser(await unpack(JSON.parse(block.textContent)));
    block.remove();
  } catch (error) {
    $("count").textContent = `The outputs cannot be unpacked (${error.message}): is this file whole? Write it again.`;
    throw error;
  }
}
