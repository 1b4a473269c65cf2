// The charts' tooltips, and their values by the keyboard.
const NUMBER = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const say = (value) => NUMBER.format(value).replace("-", "−");

/** One tooltip for all charts, read aloud where the keyboard moved it. */
function tooltip(svg, x, y, text, aloud) {
  const tip = $("tip"), box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
  tip.textContent = text;
  tip.hidden = false;
  const left = box.left + (x / view.width) * box.width, top = box.top + (y / view.height) * box.height;
  const edge = document.documentElement.clientWidth - tip.offsetWidth - 8;
  tip.style.left = `${Math.max(8, Math.min(left - tip.offsetWidth / 2, edge)) + scrollX}px`;
  const above = top - tip.offsetHeight - 14;
  tip.style.top = `${(above > 0 ? above : top + 18) + scrollY}px`;
  if (aloud) $("live").textContent = text.replaceAll("\n", ", ");
}

const SVG = "http://www.w3.org/2000/svg";
function drawn(tag, attributes) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  return node;
}

/** Stops of a chart: where the keyboard and the pointer can be, and what is shown there. */
function marksOf(svg) {
  const points = [...svg.querySelectorAll(".point")];
  return points.map((point) => ({
    x: Number(point.dataset.x), y: Number(point.dataset.y), text: point.dataset.tip,
    show: () => points.forEach((other) => other.classList.toggle("on", other === point)),
    hide: () => point.classList.remove("on"),
  }));
}

function linesOf(svg) {
  const data = JSON.parse(svg.dataset.plot);
  const at = ([low, high, start, end], value) => start + ((value - low) / (high - low)) * (end - start);
  const overlay = drawn("g", {});
  svg.append(overlay);
  const hide = () => overlay.replaceChildren();
  const dot = (colour, x, y) => drawn("circle", { cx: x, cy: y, r: 4, class: `dot s${colour}` });
  if (data.path) {
    return data.series.flatMap(([name, colour, points]) => points.map(([vx, vy]) => {
      const x = at(data.x, vx), y = at(data.y, vy);
      return { x, y, hide, text: `${name}\n${say(vy)} at ${data.xname} ${say(vx)}`,
        show: () => overlay.replaceChildren(dot(colour, x, y)) };
    }));
  }
  // Long series are thinned, each by itself: at a step the nearest point of every one is told, if it is near.
  const near = (data.x[1] - data.x[0]) / 100;
  const steps = [...new Set(data.series.flatMap(([, , points]) => points.map(([vx]) => vx)))].sort((a, b) => a - b);
  const ends = data.series.map(() => 0);
  return steps.map((vx) => {
    const found = data.series.map(([name, colour, points], place) => {
      while (ends[place] + 1 < points.length
        && Math.abs(points[ends[place] + 1][0] - vx) <= Math.abs(points[ends[place]][0] - vx)) {
        ends[place] += 1;
      }
      const [own, vy] = points[ends[place]];
      return Math.abs(own - vx) <= near ? [name, colour, vy] : null;
    }).filter(Boolean);
    const x = at(data.x, vx);
    return { x, y: Math.min(...found.map(([, , vy]) => at(data.y, vy))), column: true, hide,
      text: [`${data.xname} ${say(vx)}`, ...found.map(([name, , vy]) => `${name}: ${say(vy)}`)].join("\n"),
      show: () => overlay.replaceChildren(
        drawn("line", { x1: x, x2: x, y1: data.y[3], y2: data.y[2], class: "cursor" }),
        ...found.map(([, colour, vy]) => dot(colour, x, at(data.y, vy)))) };
  });
}

function charts() {
  for (const svg of document.querySelectorAll(".plot")) {
    let stops = null, now = -1;
    const ready = () => {
      if (!stops) stops = svg.dataset.plot ? linesOf(svg) : marksOf(svg);
      return stops;
    };
    const leave = () => {
      if (now >= 0) stops[now].hide();
      now = -1;
      $("tip").hidden = true;
    };
    const go = (place, aloud) => {
      if (now >= 0 && now !== place) stops[now].hide();
      now = place;
      stops[place].show();
      tooltip(svg, stops[place].x, stops[place].y, stops[place].text, aloud);
    };
    const near = (event) => {
      const box = svg.getBoundingClientRect(), view = svg.viewBox.baseVal;
      const x = ((event.clientX - box.left) / box.width) * view.width;
      const y = ((event.clientY - box.top) / box.height) * view.height;
      let best = -1, least = Infinity;
      ready().forEach((stop, place) => {
        const away = stop.column ? Math.abs(stop.x - x) : Math.hypot(stop.x - x, stop.y - y);
        if (away < least) [best, least] = [place, away];
      });
      if (best >= 0 && (stops[best].column || least < 60)) go(best, false);
      else leave();
    };
    svg.addEventListener("pointermove", near);
    svg.addEventListener("pointerdown", near);
    svg.addEventListener("pointerleave", leave);
    svg.addEventListener("blur", leave);
    svg.addEventListener("keydown", (event) => {
      const last = ready().length - 1;
      const to = { ArrowRight: now + 1, ArrowDown: now + 1, ArrowLeft: now - 1, ArrowUp: now - 1, Home: 0, End: last }[event.key];
      if (event.key === "Escape") leave();
      if (to === undefined || last < 0) return;
      event.preventDefault();
      go(Math.max(0, Math.min(last, to)), true);
    });
  }
}
