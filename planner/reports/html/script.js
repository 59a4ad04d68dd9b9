// What the page cannot do alone: other axes for the scatter plot, and telling a plan wherever it is pointed at.
// Everything was computed before; a point is [at, low, high, text, source, value, its low, its high], the first three in
// shares of an axis, the last three in the metric's unit.
"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const plans = new Map(data.plans.map((plan) => [plan.id, plan]));
  const card = document.getElementById("card");
  const figure = document.getElementById("plot");
  const SVG = "http://www.w3.org/2000/svg";

  const make = (name, text, className) => {
    const element = document.createElement(name);
    if (text !== undefined) element.textContent = text;
    if (className) element.className = className;
    return element;
  };
  const draw = (name, attributes) => {
    const element = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    return element;
  };
  const percent = (share) => Math.round(share * 10000) / 100;
  const clip = (share) => percent(Math.min(1, Math.max(0, share)));

  // ---- a plan in words, wherever it is pointed at

  const tell = (plan, box) => {
    const list = make("dl");
    data.metrics.forEach((metric, i) => {
      const point = plan.at[i] || plan.was[i];
      if (!point || list.childElementCount >= 18) return;
      const note = point[4] === "measured" || point[3].includes(point[4]) ? "" : ` ${point[4]}`;
      list.append(make("dt", metric.label), make("dd", point[3] + note));
    });
    card.replaceChildren(make("p", plan.words), make("div", `${plan.id}, ${plan.role}`), list);
    card.hidden = false;
    const size = card.getBoundingClientRect();
    const left = Math.min(Math.max(8, box.left + box.width / 2 + 14), innerWidth - size.width - 8);
    const below = box.bottom + 10 + size.height < innerHeight;
    card.style.left = `${Math.max(8, left)}px`;
    card.style.top = `${Math.max(8, below ? box.bottom + 10 : box.top - size.height - 10)}px`;
  };
  const light = (id) => {
    for (const element of document.querySelectorAll(".lit")) element.classList.remove("lit");
    if (id) for (const element of document.querySelectorAll(`[data-plan="${CSS.escape(id)}"]`)) element.classList.add("lit");
  };
  const show = (event) => {
    const holder = event.target.closest("[data-plan]");
    const plan = holder && plans.get(holder.dataset.plan);
    if (!plan) return hide();
    light(plan.id);
    const pointed = event.type === "mouseover" && holder.getBoundingClientRect().width > 40;
    const box = pointed ? new DOMRect(event.clientX, event.clientY, 1, 1) : holder.getBoundingClientRect();
    if (!holder.closest("table, .hero")) tell(plan, box);
  };
  const hide = () => {
    light(null);
    card.hidden = true;
  };
  document.addEventListener("mouseover", show);
  document.addEventListener("focusin", show);
  document.addEventListener("keydown", (event) => event.key === "Escape" && hide());
  const follow = () => {
    const plan = plans.get(document.activeElement.dataset.plan);
    if (plan && !card.hidden) tell(plan, document.activeElement.getBoundingClientRect());
    else card.hidden = true;
  };
  document.addEventListener("scroll", follow, { passive: true });

  // ---- printing shows what is folded away

  addEventListener("beforeprint", () => {
    for (const fold of document.querySelectorAll("details:not([open], .long)")) {
      fold.open = true;
      fold.dataset.folded = "";
    }
  });
  addEventListener("afterprint", () => {
    for (const fold of document.querySelectorAll("details[data-folded]")) {
      fold.open = false;
      delete fold.dataset.folded;
    }
  });

  // ---- the scatter plot on any two metrics

  if (!figure) return;
  const find = (selector) => figure.querySelector(selector);
  const across = find("#across"), up = find("#up"), was = find("#was"), marks = find(".marks");
  const size = find("#size"), colour = find("#colour");

  const side = (axis, name, vertical) => {
    const ticks = find(`.ticks-${name}`), title = find(`.${name}-title`);
    title.querySelector("span").textContent = axis.label;
    title.querySelector("small").textContent = `${axis.better} is better${axis.log ? ", logarithmic" : ""}`;
    ticks.replaceChildren(...axis.ticks.map(([at, text]) => {
      const tick = make("span", text);
      tick.style[vertical ? "bottom" : "left"] = `${percent(at)}%`;
      return tick;
    }));
  };
  const within = (limit) => {
    if (!limit) return [0, 100];
    return limit[1] === "max" ? [0, clip(limit[0])] : [clip(limit[0]), 100];
  };
  const inside = (limit) => limit && limit[0] >= 0 && limit[0] <= 1;
  const best = (points, x, y) => {
    const [signX, signY] = [x, y].map((axis) => (axis.better === "lower" ? 1 : -1));
    const front = [];
    points.sort((a, b) => signX * (a[0] - b[0]) || signY * (a[1] - b[1]));
    for (const point of points) if (!front.length || signY * (point[1] - front[front.length - 1][1]) < 0) front.push(point);
    if (!front.length) return "";
    const [worstX, worstY] = [x.better === "lower" ? 100 : 0, y.better === "lower" ? 0 : 100];
    const steps = front.slice(1).map(([a, b]) => `H${percent(a)}V${100 - percent(b)}`).join("");
    return `M${percent(front[0][0])} ${worstY}V${100 - percent(front[0][1])}${steps}H${worstX}`;
  };
  // Size and colour show two more metrics. A plan without a figure of one keeps its own look.
  const dress = (picture, plan) => {
    const [sized, coloured] = [size, colour].map((control) => control.value && plan.at[Number(control.value)]);
    if (sized) picture.style.scale = 0.6 + 1.2 * sized[0];
    if (coloured) picture.style.color = `color-mix(in oklab, var(--accent), var(--best) ${percent(coloured[0])}%)`;
  };
  const ends = (control) => {
    const key = find(`.key-${control.id}`);
    const points = control.value ? data.plans.map((plan) => plan.at[Number(control.value)]).filter(Boolean) : [];
    points.sort((a, b) => a[0] - b[0]);
    key.hidden = !points.length;
    if (points.length) key.querySelectorAll("span").forEach((end, i) => (end.textContent = points[i ? points.length - 1 : 0][3]));
  };
  const mark = (plan, p, q, predicted) => {
    const hollow = predicted || p[4] !== "measured" || q[4] !== "measured";
    const point = make("span", undefined, predicted ? "point was" : "point");
    const picture = draw("svg", { class: `mark k-${plan.kind}${hollow ? " hollow" : ""}`, viewBox: "0 0 16 16", "aria-hidden": "true" });
    picture.append(draw("use", { href: `#s-${plan.kind}` }));
    if (!predicted) dress(picture, plan);
    point.append(picture);
    point.dataset.plan = plan.id;
    point.style.left = `${percent(p[0])}%`;
    point.style.bottom = `${percent(q[0])}%`;
    if (!predicted) {
      point.tabIndex = -1;
      point.setAttribute("role", "img");
      point.setAttribute("aria-label", `${plan.words}, ${plan.role}: ${p[3]}, ${q[3]}`);
    }
    return point;
  };
  const bars = (plan, p, q) => draw("path", {
    class: `k-${plan.kind}`,
    d: `M${clip(p[1])} ${100 - percent(q[0])}H${clip(p[2])}M${percent(p[0])} ${100 - clip(q[1])}V${100 - clip(q[2])}`,
  });
  const shown = (p, q) => p && q && [p[0], q[0]].every((at) => at >= 0 && at <= 1);

  const redraw = () => {
    const i = Number(across.value), j = Number(up.value), x = data.metrics[i], y = data.metrics[j];
    side(x, "across", false);
    side(y, "up", true);
    find(".area").setAttribute("aria-label", `Plans by ${x.label} and ${y.label}; the arrow keys go from plan to plan`);
    const [x0, x1] = within(x.limit), [y0, y1] = within(y.limit);
    find(".shade").replaceChildren(...(x.limit || y.limit ? [draw("rect", { x: x0, width: x1 - x0, y: 100 - y1, height: y1 - y0 })] : []));
    find(".grid").replaceChildren(
      ...x.ticks.map(([at]) => draw("path", { d: `M${percent(at)} 0V100` })),
      ...y.ticks.map(([at]) => draw("path", { d: `M0 ${100 - percent(at)}H100` })),
    );
    const limits = [], texts = [];
    if (inside(x.limit)) {
      const text = make("span", x.limit[2], `across${x.limit[0] < 0.2 ? " near" : ""}${inside(y.limit) && y.limit[0] < 0.15 ? " high" : ""}`);
      text.style.left = `${percent(x.limit[0])}%`;
      limits.push(draw("path", { d: `M${percent(x.limit[0])} 0V100` }));
      texts.push(text);
    }
    if (inside(y.limit)) {
      const text = make("span", y.limit[2], "up");
      text.style.bottom = `${percent(y.limit[0])}%`;
      limits.push(draw("path", { d: `M0 ${100 - percent(y.limit[0])}H100` }));
      texts.push(text);
    }
    find(".limits").replaceChildren(...limits);
    find(".limit-texts").replaceChildren(...texts);
    const points = [], lines = [], feasible = [];
    for (const plan of [...data.plans].reverse()) {
      const [p, q, before, after] = [plan.at[i], plan.at[j], plan.was[i], plan.was[j]];
      if (was && was.checked && shown(before, after)) {
        points.push(mark(plan, before, after, true));
        lines.push(bars(plan, before, after));
      }
      if (!shown(p, q)) continue;
      points.push(mark(plan, p, q, false));
      lines.push(bars(plan, p, q));
      if (plan.feasible) feasible.push([p[0], q[0]]);
    }
    marks.replaceChildren(...points);
    find(".bars").replaceChildren(...lines);
    find(".front").setAttribute("d", best(feasible, x, y));
    [size, colour].forEach(ends);
    const first = marks.querySelector(".point:not(.was):last-child") || marks.querySelector(".point:not(.was)");
    if (first) first.tabIndex = 0;
  };
  marks.addEventListener("keydown", (event) => {
    const move = { ArrowRight: 1, ArrowDown: 1, ArrowLeft: -1, ArrowUp: -1 }[event.key];
    if (!move) return;
    event.preventDefault();
    const order = [...marks.querySelectorAll(".point:not(.was)")].sort((a, b) => parseFloat(a.style.left) - parseFloat(b.style.left));
    const here = order.indexOf(document.activeElement);
    const next = order[(here + move + order.length) % order.length];
    document.activeElement.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
  for (const control of [across, up, size, colour, was]) if (control) control.addEventListener("change", redraw);
  find(".controls").addEventListener("submit", (event) => event.preventDefault());
  find(".controls").hidden = false;
  redraw();
})();
