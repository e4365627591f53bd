"use strict";
// The atlas' table: search, filters, sorting, pages, cards. Everything shown is set as text, never as HTML.
(() => {
  const PAGE = 50, data = window.ATLAS, total = data.layer.length, categories = data.categories;
  const form = document.getElementById("filters"), status = document.getElementById("status");
  const table = document.getElementById("atlas"), body = table.tBodies[0], pager = document.getElementById("pager");
  const heads = [...table.tHead.rows[0].cells], chunks = new Map();
  const state = { page: 0, key: null, down: true, found: [...Array(total).keys()], open: null };

  const make = (tag, content, attributes) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) made.setAttribute(name, value);
    made.append(...[].concat(content ?? []));
    return made;
  };
  const word = (column, i) => data[column].words[data[column].codes[i]];
  const short = v => v === null || v === undefined ? "–" : Math.abs(v) >= 100 ? String(Math.round(v)) : Number(v.toPrecision(3)).toString();
  const names = i => data.sets[i].map(c => categories[c]).join(" ");
  const name = i => {
    const said = ["L" + data.layer[i]], expert = data.expert[i], neuron = data.neuron[i];
    if (expert !== null) said.push("expert " + expert);
    if (neuron !== null) said.push((expert !== null ? "neuron " : word("unit", i) + " ") + neuron);
    return said.join(" ");
  };
  const most = i => Math.max(...data.p.map(column => column[i]));

  // ---- search and sorting
  let texts = null;
  const text = i => {
    texts ??= Array(total);
    return texts[i] ??= [name(i), word("pair", i), word("part", i), word("fate", i), names(i),
      data.massive[i] ? "massive" : "", data.words[i]].join(" ").toLowerCase();
  };
  const VALUES = {
    name: i => ((data.layer[i] * 1e5 + (data.expert[i] ?? -1) + 1) * 1e8) + (data.neuron[i] ?? -1),
    p: i => form.elements.by.value === "" ? most(i) : data.p[form.elements.by.value][i],
    sets: i => data.sets[i].length,
    part: i => word("part", i),
    fate: i => word("fate", i),
    rank: i => data.rank[i],
    effect: i => data.effect[i],
    beyond: i => data.effect[i] === null || data.effect_control[i] === null ? null : data.effect[i] - data.effect_control[i],
  };
  const absent = v => v === null || v === "";
  function compare(a, b) { // what is absent comes last, whichever way
    const x = a[1], y = b[1];
    if (absent(x) || absent(y)) return absent(x) - absent(y) || a[0] - b[0];
    const order = x < y ? -1 : x > y ? 1 : 0;
    return (state.down ? -order : order) || a[0] - b[0];
  }
  function find() {
    const asked = form.elements, words = asked.words.value.toLowerCase().split(/\s+/).filter(Boolean);
    const chosen = ["pair", "unit", "part", "fate"].filter(k => asked[k].value !== "");
    const set = asked.sets.value === "" ? null : Number(asked.sets.value), kept = [];
    for (let i = 0; i < total; i++) {
      if (chosen.every(k => data[k].codes[i] === Number(asked[k].value))
        && (set === null || data.sets[i].includes(set))
        && words.every(w => text(i).includes(w))) kept.push(i);
    }
    state.found = kept;
    if (state.key) {
      const value = VALUES[state.key];
      state.found = kept.map(i => [i, value(i)]).sort(compare).map(pair => pair[0]);
    }
    state.page = 0;
    draw();
  }

  // ---- rows
  const strip = i => make("span", data.p.map(column => make("i", [], { style: `--p:${column[i] / 1000}` })), {
    class: "strip", role: "img",
    "aria-label": "p: " + categories.map((c, k) => `${c} ${(data.p[k][i] / 1000).toFixed(2)}`).join(", "),
  });
  function row(i) {
    const button = make("button", name(i), { type: "button", "aria-expanded": "false", "aria-controls": "card" });
    button.addEventListener("click", () => toggle(button, i));
    const cells = [names(i), word("part", i) + (data.massive[i] ? " (massive)" : ""), word("fate", i)];
    const numbers = [data.rank[i], data.effect[i], VALUES.beyond(i)];
    return make("tr", [
      make("th", [button, " ", make("small", word("pair", i))], { scope: "row" }),
      make("td", strip(i)),
      ...cells.map(c => make("td", make("bdi", c))),
      ...numbers.map(v => make("td", short(v), { class: "number" })),
    ]);
  }
  function draw() {
    const pages = Math.max(1, Math.ceil(state.found.length / PAGE)), from = state.page * PAGE;
    state.open = null;
    body.replaceChildren(...state.found.slice(from, from + PAGE).map(row));
    const said = `${state.found.length} of ${total} components`;
    status.textContent = said + (state.found.length ? "" : ": none fits. Search for less.");
    pager.querySelector("span").textContent = `page ${state.page + 1} of ${pages}`;
    pager.querySelector("[data-step='-1']").disabled = state.page === 0;
    pager.querySelector("[data-step='1']").disabled = state.page + 1 >= pages;
    for (const head of heads) {
      head.setAttribute("aria-sort", head.dataset.key !== state.key ? "none" : state.down ? "descending" : "ascending");
    }
  }

  // ---- cards: their data come in files of their own, read when first needed
  data.take = (n, rows) => { for (const use of chunks.get(n).waiting.splice(0)) use(rows); chunks.get(n).rows = rows; };
  function details(i, use) {
    const n = Math.floor(i / data.chunk), here = chunks.get(n) ?? { waiting: [] }, at = i % data.chunk;
    if (here.rows) { use(here.rows[at]); return; }
    here.waiting.push(rows => use(rows[at]));
    if (chunks.has(n)) return;
    chunks.set(n, here);
    const script = make("script", [], { src: `atlas/${n}.js` });
    script.addEventListener("error", () => { chunks.delete(n); status.textContent = `atlas/${n}.js is missing: run make site again.`; });
    document.head.append(script);
  }
  function toggle(button, i) {
    const again = state.open && state.open.button === button;
    close();
    if (again) return;
    button.setAttribute("aria-expanded", "true");
    const box = make("td", make("div", "reading …", { class: "card" }), { colspan: heads.length, id: "card" });
    const line = make("tr", box);
    button.closest("tr").after(line);
    state.open = { button, line };
    details(i, rest => { if (state.open && state.open.line === line) box.replaceChildren(card(i, rest)); });
  }
  function close() {
    if (!state.open) return;
    state.open.button.setAttribute("aria-expanded", "false");
    state.open.line.remove();
    state.open = null;
  }
  const grid = (caption, head, lines) => make("table", [
    make("caption", caption),
    make("thead", make("tr", head.map(h => make("th", h, { scope: "col" })))),
    make("tbody", lines),
  ]);
  const wide = (inner, label) => make("div", inner, { class: "wide", tabindex: "0", role: "region", "aria-label": label });
  function card(i, [low, high, score, rank, tokens, bounds]) {
    const percent = v => `${100 * Math.min(1, Math.max(0, v ?? 0))}%`;
    const lines = categories.map((c, k) => {
      const p = data.p[k][i] / 1000, width = percent((high[k] ?? p) - (low[k] ?? p));
      const bar = make("span", [
        make("i", [], { style: `left:${percent(low[k] ?? p)};width:${width}` }),
        make("b", [], { style: `left:${percent(p)}` }),
      ], { class: "bar", "aria-hidden": "true" });
      const cells = [p.toFixed(3), bar, `${short(low[k])} to ${short(high[k])}`, short(score[k]), short(rank[k])];
      return make("tr", [
        make("th", [make("bdi", c), data.sets[i].includes(k) ? " ✓" : ""], { scope: "row" }),
        ...cells.map(v => make("td", v, { class: "number" })),
      ]);
    });
    const head = ["category", "p", "0 … 1", "95 % interval", "score", "rank"];
    return make("div", [
      make("h3", `${name(i)} of ${word("pair", i)}`),
      make("p", facts(i, bounds)),
      make("div", [wide(grid("How often it is active (✓: in its set)", head, lines), "p by category"), wide(layers(i), "p by layer")], { class: "parts" }),
      make("h3", "Where it is strongest"),
      tokens.length ? make("ol", tokens.map(token), { class: "tokens" }) : make("p", "No tokens were kept."),
    ], { class: "card", role: "group", "aria-label": `Card of ${name(i)}` });
  }
  function facts(i, [low, high]) {
    const said = [names(i) ? `In the set of ${names(i)}` : "In no set now"];
    if (word("part", i)) said.push(`part: ${word("part", i)}`);
    if (word("fate", i)) said.push(`under tuning: ${word("fate", i)}`);
    if (data.massive[i]) said.push("massive activation");
    if (word("score", i)) said.push(`chosen by ${word("score", i)}`);
    said.push(data.effect[i] === null ? "no effect was measured"
      : `effect${word("effect_of", i) ? ` (${word("effect_of", i)})` : ""}: ${short(data.effect[i])} [${short(low)}, ${short(high)}], control ${short(data.effect_control[i])}`);
    return said.join(" · ") + ".";
  }
  function layers(i) {
    const own = data.layer[i], key = `${word("pair", i)}|${word("unit", i)}`;
    const lines = data.means[key].map(([layer, ...p]) => make("tr", [
      make("th", layer === own ? ["L" + layer + " ◂", make("span", "this one", { class: "unseen" })] : "L" + layer, { scope: "row" }),
      ...(layer === own ? data.p.map(column => column[i]) : p).map((v, k) => make("td", make("span", (v / 1000).toFixed(2), { class: "unseen" }), {
        class: "heat", style: `--p:${v / 1000}`, title: `${categories[k]}: ${(v / 1000).toFixed(2)}`,
      })),
    ], layer === own ? { class: "own" } : {}));
    return grid("p by layer (◂: this one's own; else the mean of those listed)", ["layer", ...categories], lines);
  }
  function token([row_, position, token_, left, right, value]) {
    const core = String(token_).trim() || String(token_).replace(/\n/g, "↵").replace(/\s/g, "␣") || "∅";
    return make("li", [ // the parts come without the spaces between them
      make("bdi", [String(left), " ", make("mark", make("bdi", core)), " ", String(right)]), " ",
      make("small", `row ${row_}, position ${position}, value ${short(typeof value === "number" ? value : null)}`),
    ]);
  }

  // ---- controls
  const fill = (key, all, words) => {
    const list = form.elements[key];
    list.append(new Option(all, ""), ...words.map((w, n) => new Option(w || "(none)", n)));
    list.closest("label").hidden = words.length < 2;
  };
  for (const key of ["pair", "unit", "part", "fate"]) fill(key, "all", data[key].words);
  fill("sets", "any", categories);
  fill("by", "the largest", categories);
  table.classList.toggle("many", categories.length > 12);
  for (const head of heads) {
    const button = make("button", head.textContent, { type: "button" });
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const key = head.dataset.key, first = !["name", "part", "fate", "rank"].includes(key);
      state.down = state.key === key ? !state.down : first;
      state.key = key;
      find();
    });
  }
  let timer = 0;
  form.addEventListener("input", () => { clearTimeout(timer); timer = setTimeout(find, 120); });
  form.addEventListener("submit", event => event.preventDefault());
  pager.addEventListener("click", event => {
    const step = Number(event.target.dataset && event.target.dataset.step);
    if (!step) return;
    state.page += step;
    draw();
    table.scrollIntoView({ block: "start" });
  });
  document.addEventListener("keydown", event => {
    if (event.key !== "Escape" || !state.open) return;
    const { button } = state.open;
    close();
    button.focus();
  });
  form.hidden = pager.hidden = false;
  draw();
})();
