"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const samples = data.samples, ROW = 64;
  const HIDDEN = new RegExp("[" + data.hidden + "]", "gu");
  const at = (id) => document.getElementById(id);
  const store = {
    get(name) { try { return sessionStorage.getItem(location.pathname + name); } catch { return null; } },
    set(name, value) { try { sessionStorage.setItem(location.pathname + name, value); } catch { /* private mode */ } },
  };

  const box = at("refresh");
  if (box) {
    if (store.get("refresh") === "off") box.checked = false;
    box.addEventListener("change", () => store.set("refresh", box.checked ? "on" : "off"));
    setInterval(() => { if (box.checked) location.reload(); }, data.refresh * 1000);
  }

  // On paper there is nothing to click, so tables are open there.
  let opened = [];
  addEventListener("beforeprint", () => {
    opened = [...document.querySelectorAll("details.numbers:not([open])")];
    opened.forEach((one) => { one.open = true; });
  });
  addEventListener("afterprint", () => opened.forEach((one) => { one.open = false; }));

  if (!samples.length) return;
  at("browser").hidden = false;
  const list = at("list"), inner = at("inner"), detail = at("detail"), count = at("count");
  const fields = ["query", "group", "run", "only", "sort"].map(at).filter(Boolean);
  let shown = [], chosen = null, query = "";

  const make = (tag, name, text) => {
    const node = document.createElement(tag);
    if (name) node.className = name;
    if (text !== undefined) node.textContent = text;
    return node;
  };

  // A text as text: no markup in it counts, hidden characters are boxes, and what was searched for is marked.
  const write = (node, text, limit) => {
    const cut = limit && text.length > limit ? text.slice(0, limit) + "…" : text;
    const plain = (part) => {
      if (!query) { node.append(part); return; }
      const low = part.toLowerCase();
      let from = 0;
      for (let to = low.indexOf(query); to >= 0 && low.length === part.length; to = low.indexOf(query, from)) {
        node.append(part.slice(from, to));
        node.append(make("mark", "", part.slice(to, to + query.length)));
        from = to + query.length;
      }
      node.append(part.slice(from));
    };
    let last = 0;
    for (const found of cut.matchAll(HIDDEN)) {
      plain(cut.slice(last, found.index));
      const code = found[0].codePointAt(0).toString(16).toUpperCase().padStart(4, "0");
      node.append(make("span", "hidden-char", "U+" + code));
      last = found.index + found[0].length;
    }
    plain(cut.slice(last));
    return node;
  };

  const number = (value) => String(Math.round(value * 1000) / 1000).replace("-", "−");
  const whole = (value) => String(Math.round(value * 10) / 10);
  const entries = (sample) => sample.e || [];
  const has = (sample, tag) => entries(sample).some((one) => (one.tags || []).includes(tag));
  const best = (sample) => entries(sample).reduce((top, one) => one.sc === undefined ? top : Math.max(top, one.sc), -Infinity);
  const longest = (sample) => entries(sample).reduce((top, one) => Math.max(top, one.t.length), 0);
  const hay = (sample) => {
    if (!sample.hay) {
      const notes = (one) => (one.n || []).map((note) => note[1]).join("\n");
      sample.hay = [sample.i, sample.p || "", ...entries(sample).map((one) => one.t + "\n" + notes(one))].join("\n").toLowerCase();
    }
    return sample.hay;
  };
  // All searched texts of a large page take a second, so they are made in small parts before anyone searches.
  const prepare = (from) => {
    samples.slice(from, from + 100).forEach(hay);
    if (from + 100 < samples.length) setTimeout(prepare, 0, from + 100);
  };
  const ONLY = {
    pair: (one) => has(one, "chosen"),
    tie: (one) => best(one) > -Infinity && !has(one, "chosen") && one.g !== "evaluation",
    noscore: (one) => has(one, "no score"),
    cut: (one) => has(one, "cut off"),
    changed: (one) => Boolean(one.ch),
  };
  const by = (key) => (a, b) => key(b) - key(a);
  const or = (value, other) => value === undefined ? other : value;
  const SORT = {
    gap: by((one) => or(one.gap, -1)),
    low: (a, b) => (best(a) === -Infinity) - (best(b) === -Infinity) || best(a) - best(b),
    up: by((one) => or(one.ch, -Infinity)),
    down: (a, b) => or(a.ch, Infinity) - or(b.ch, Infinity),
    long: by(longest),
    prompt: (a, b) => (a.p || "").localeCompare(b.p || ""),
  };

  const filter = () => {
    const value = (id) => at(id) ? at(id).value : "";
    query = value("query").trim().toLowerCase();
    fields.forEach((field) => store.set(field.id, field.value));
    const only = ONLY[value("only")], group = value("group"), run = value("run");
    shown = samples.filter((one) =>
      (!group || one.g === group) && (!run || (one.r || []).includes(Number(run))) && (!only || only(one)) &&
      (!query || hay(one).includes(query)));
    const order = SORT[value("sort")];
    if (order) shown.sort(order);
    count.textContent = shown.length === samples.length
      ? `${samples.length.toLocaleString("en")} samples` : `${shown.length.toLocaleString("en")} of ${samples.length.toLocaleString("en")} samples`;
    inner.style.height = `${shown.length * ROW}px`;
    list.scrollTop = 0;
    choose(shown.includes(chosen) ? chosen : shown[0] || null, true);
  };

  const under = (one) => {
    const parts = [one.g];
    if (data.runs.length > 1 && (one.r || []).length === 1) parts.push(data.runs[one.r[0]]);
    if (one.q) {
      const runs = [...new Set(one.q.map((q) => q[0]))];
      parts.push(`quality ${runs.map((run) => one.q.filter((q) => q[0] === run).map((q) => whole(q[2])).join(" → ")).join(" | ")}`);
    }
    else if (best(one) > -Infinity) parts.push(`best score ${number(best(one))}${one.gap ? `, gap ${number(one.gap)}` : ""}`);
    parts.push(has(one, "chosen") ? "pair" : `${entries(one).length} texts`);
    return parts.join(" · ");
  };

  const draw = () => {
    const first = Math.max(0, Math.floor(list.scrollTop / ROW) - 5);
    const last = Math.min(shown.length, Math.ceil((list.scrollTop + list.clientHeight) / ROW) + 5);
    const rows = [];
    for (let n = first; n < last; n += 1) {
      const one = shown[n], row = make("div", "row");
      row.id = `sample-${n}`;
      row.style.top = `${n * ROW}px`;
      row.setAttribute("role", "option");
      row.setAttribute("aria-selected", String(one === chosen));
      row.setAttribute("aria-setsize", String(shown.length));
      row.setAttribute("aria-posinset", String(n + 1));
      row.append(write(make("p"), one.p || one.i, 160), write(make("p", "under"), under(one)));
      row.addEventListener("click", () => choose(one));
      rows.push(row);
    }
    inner.replaceChildren(...rows);
    const place = shown.indexOf(chosen);
    if (place >= first && place < last) list.setAttribute("aria-activedescendant", `sample-${place}`);
    else list.removeAttribute("aria-activedescendant");
  };

  const entryNode = (one, heading) => {
    const tags = one.tags || [];
    const node = make("div", `entry ${tags.includes("chosen") ? "chosen" : ""} ${tags.includes("rejected") ? "rejected" : ""}`);
    const head = make("p", "entry-head");
    if (one.i !== heading) head.append(write(make("span"), one.i.startsWith(heading + "#") ? `sample ${one.i.slice(heading.length + 1)}` : one.i));
    if (one.k) head.append(make("span", "", `${one.k} tokens`));
    tags.forEach((tag) => head.append(write(make("span", `tag ${tag === "chosen" || tag === "rejected" ? tag : ""}`), (tag === "chosen" ? "✓ " : tag === "rejected" ? "✗ " : "") + tag)));
    if (one.sc !== undefined) {
      const all = (one.v || []).filter((v) => v !== null);
      const spread = all.length > 1 && new Set(all).size > 1 ? ` (${all.map(number).join(", ")})` : "";
      head.append(make("span", "score", `score ${number(one.sc)}${spread}`));
    }
    node.append(head);
    if (one.t) node.append(write(make("div", "text"), one.t));
    else node.append(make("p", "quiet", "(empty)"));
    (one.n || []).forEach(([title, text, times]) => {
      const note = make("details", "note");
      note.append(write(make("summary"), title + (times ? ` (${times} times)` : "")), write(make("div", "text"), text));
      if (query && text.toLowerCase().includes(query)) note.open = true;
      node.append(note);
    });
    return node;
  };

  const show = () => {
    if (!chosen) { detail.replaceChildren(make("p", "quiet", "No sample fits. Clear the search, or choose other iterations.")); return; }
    const nodes = [write(make("p", "text prompt"), chosen.p || "(the run does not hold the text of this prompt)"), write(make("p", "quiet"), `${chosen.g} · ${chosen.i}`)];
    const same = chosen.p ? samples.filter((one) => one !== chosen && one.p === chosen.p) : [];
    if (same.length) {
      const links = make("p", "links", "The same prompt in: ");
      same.slice(0, 12).forEach((one) => {
        const button = make("button", "", one.g + (data.runs.length > 1 && (one.r || []).length === 1 ? `, ${data.runs[one.r[0]]}` : ""));
        button.type = "button";
        button.addEventListener("click", () => choose(one));
        links.append(button);
      });
      nodes.push(links);
    }
    let model = "", stage = "";
    entries(chosen).forEach((one) => {
      const made = (data.runs.length > 1 ? `${data.runs[one.r]} · ` : "") + one.s;
      if (made !== model) {
        const quality = (chosen.q || []).find((q) => q[0] === one.r && q[1] === one.s);
        nodes.push(write(make("h3"), made + (quality ? ` · quality ${whole(quality[2])}` : "")));
        stage = "";
      }
      if (one.f !== stage) nodes.push(write(make("p", "stage"), one.f));
      [model, stage] = [made, one.f];
      nodes.push(entryNode(one, chosen.i));
    });
    detail.replaceChildren(...nodes);
    detail.scrollTop = 0;
  };

  const choose = (one, keep) => {
    chosen = one;
    if (one) store.set("chosen", `${one.g}\n${one.i}\n${(one.r || [])[0]}`);
    const place = shown.indexOf(one);
    if (!keep && place >= 0) {
      if (place * ROW < list.scrollTop) list.scrollTop = place * ROW;
      if ((place + 1) * ROW > list.scrollTop + list.clientHeight) list.scrollTop = (place + 1) * ROW - list.clientHeight;
    }
    draw();
    show();
  };

  let waiting = 0;
  fields.forEach((field) => field.addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(filter, field.id === "query" ? 120 : 0); }));
  let pending = false;
  list.addEventListener("scroll", () => {
    if (!pending) { pending = true; requestAnimationFrame(() => { pending = false; draw(); }); }
  });
  addEventListener("resize", draw);
  list.addEventListener("keydown", (event) => {
    const page = Math.max(1, Math.floor(list.clientHeight / ROW) - 1);
    const moves = { ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -shown.length, End: shown.length };
    if (!(event.key in moves) || !shown.length) return;
    event.preventDefault();
    choose(shown[Math.min(shown.length - 1, Math.max(0, shown.indexOf(chosen) + moves[event.key]))]);
  });
  addEventListener("keydown", (event) => {
    if (event.key === "/" && !/^(INPUT|SELECT|TEXTAREA)$/.test(document.activeElement.tagName)) { event.preventDefault(); at("query").focus(); }
  });

  fields.forEach((field) => { const before = store.get(field.id); if (before) field.value = before; });
  const before = store.get("chosen");
  chosen = samples.find((one) => `${one.g}\n${one.i}\n${(one.r || [])[0]}` === before) || null;
  filter();
  setTimeout(prepare, 0, 0);
})();
