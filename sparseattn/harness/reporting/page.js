"use strict";
// Charts in the colours of the style sheet, drawn anew when the scheme or the width changes.
(() => {
  const charts = JSON.parse(document.getElementById("charts").textContent);
  const dark = matchMedia("(prefers-color-scheme: dark)");
  const narrow = matchMedia("(max-width: 860px)");

  function theme() {
    const style = getComputedStyle(document.documentElement);
    const of = (name) => style.getPropertyValue("--" + name).trim();
    const font = style.fontFamily;
    const text = { font, fontSize: 12, color: of("ink") };
    return {
      background: "transparent",
      font,
      view: { stroke: null },
      axis: {
        labelColor: of("soft"), titleColor: of("soft"), gridColor: of("grid"),
        domainColor: of("line"), tickColor: of("line"), labelFontSize: 11.5, titleFontSize: 12,
        titleFontWeight: "normal", titlePadding: 10, labelPadding: 4,
      },
      legend: { labelColor: of("ink"), titleColor: of("soft"), labelFontSize: 12, titleFontSize: 12,
                titleFontWeight: "normal", symbolStrokeWidth: 1.8 },
      title: { color: of("ink"), fontSize: 13, fontWeight: 600, anchor: "start", offset: 10 },
      header: { labelColor: of("ink"), labelFontSize: 12 },
      range: { category: [1, 2, 3, 4, 5, 6, 7].map((at) => of("c" + at)) },
      style: {
        name: text,
        end: { font, fontSize: 12 },
        halo: { ...text, color: of("paper"), stroke: of("paper"), strokeWidth: 4, strokeJoin: "round" },
        guide: { color: of("soft"), strokeDash: [2, 3] },
        "guide-words": { font, fontSize: 11, color: of("soft") },
        front: { color: of("ink"), strokeWidth: 1.2 },
        leader: { color: of("line") },
        dot: { filled: true, size: 90, opacity: 1, strokeWidth: 1.8, color: of("c1"), stroke: of("c1") },
        heat: { stroke: of("paper"), strokeWidth: 1 },
      },
    };
  }

  let turn = 0;
  async function draw() {
    const mine = ++turn;
    const config = theme();
    for (const [id, sizes] of Object.entries(charts)) {
      if (mine !== turn) return; // a later change draws everything
      const place = document.getElementById(id);
      const spec = sizes[narrow.matches ? "narrow" : "wide"];
      // ast: expressions are interpreted, so that the page needs no eval.
      await vegaEmbed(place, spec, { mode: "vega-lite", renderer: "svg", actions: false, ast: true, config });
    }
    document.documentElement.dataset.drawn = "yes";
  }
  dark.addEventListener("change", draw);
  narrow.addEventListener("change", draw);
  draw();

  // Tables: a header sorts, up and then down; what has no value stays last.
  for (const table of document.querySelectorAll("table.sortable")) {
    const heads = [...table.tHead.rows[0].cells];
    const body = table.tBodies[0];
    heads.forEach((head, at) => head.querySelector("button").addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      const numeric = head.classList.contains("num");
      const key = (row) => {
        const cell = row.cells[at];
        if (!numeric) return cell.textContent === "-" ? "" : cell.textContent;
        return cell.dataset.v === undefined ? "" : Number(cell.dataset.v);
      };
      const order = (a, b) => {
        const [x, y] = [key(a), key(b)];
        if (x === "" || y === "") return (x === "") - (y === "");
        const less = numeric ? x - y : x.localeCompare(y);
        return down ? -less : less;
      };
      body.append(...[...body.rows].sort(order));
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
    }));
  }
})();
