"use strict";
(() => {
  const root = document.documentElement;
  const all = (selector, from = document) => [...from.querySelectorAll(selector)];

  // Light or dark: as the system is set, until the reader chooses.
  const dark = matchMedia("(prefers-color-scheme: dark)");
  let chosen = null;
  const paint = () => { root.dataset.theme = chosen ?? (dark.matches ? "dark" : "light"); };
  dark.addEventListener("change", paint);
  paint();
  all("[data-theme-toggle]").forEach((button) => button.addEventListener("click", () => {
    chosen = root.dataset.theme === "dark" ? "light" : "dark";
    paint();
  }));

  // Pictures: one slider moves its own pair, the buttons all of them.
  const cut = (stage, percent) => {
    stage.style.setProperty("--cut", `${percent}%`);
    const slider = stage.querySelector("input");
    slider.value = percent;
    slider.setAttribute("aria-valuetext", `${percent}% full precision`);
  };
  all(".stage").forEach((stage) => {
    const slider = stage.querySelector("input");
    slider.addEventListener("input", () => cut(stage, slider.value));
  });
  all("[data-cut]").forEach((button) => button.addEventListener("click", () => {
    all("[data-cut]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    all(".stage").forEach((stage) => cut(stage, button.dataset.cut));
  }));

  // Bits of weights or of inputs.
  all("[data-bits]").forEach((button) => button.addEventListener("click", () => {
    all("[data-bits]").forEach((other) => other.setAttribute("aria-pressed", String(other === button)));
    all(".bits td span").forEach((cell) => {
      const bits = cell.dataset[button.dataset.bits];
      cell.textContent = bits;
      cell.className = cell.className.replace(/\bb\d+/, `b${bits}`);
    });
  }));

  // Heat maps: the value under the pointer.
  const readout = document.createElement("div");
  readout.className = "readout";
  readout.hidden = true;
  document.body.append(readout);
  all("figure[data-heat]").forEach((figure) => {
    const heat = JSON.parse(document.getElementById(figure.dataset.heat).textContent);
    figure.addEventListener("pointermove", (event) => {
      const box = figure.querySelector("img").getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / box.width * heat.steps.length);
      const row = Math.floor((event.clientY - box.top) / box.height * heat.rows.length);
      const inside = column >= 0 && row >= 0 && column < heat.steps.length && row < heat.rows.length;
      readout.hidden = !inside;
      if (!inside) return;
      const value = heat.values[row][column];
      readout.textContent = `${heat.rows[row]}, step ${heat.steps[column]}: ${value === null ? "no finite value" : value}`;
      const right = event.clientX > innerWidth - 240;
      readout.style.left = right ? "auto" : `${event.clientX + 14}px`;
      readout.style.right = right ? `${innerWidth - event.clientX + 14}px` : "auto";
      readout.style.top = `${event.clientY + 14}px`;
    });
    figure.addEventListener("pointerleave", () => { readout.hidden = true; });
  });

  // Tables: sorted by a click on a heading, narrowed by what is typed.
  all("table.sortable").forEach((table) => {
    const body = table.tBodies[0];
    all("thead th", table).forEach((heading, place) => {
      heading.querySelector("button")?.addEventListener("click", () => {
        const descending = heading.getAttribute("aria-sort") === "ascending";
        all("thead th", table).forEach((other) => other.removeAttribute("aria-sort"));
        heading.setAttribute("aria-sort", descending ? "descending" : "ascending");
        const key = (row) => row.cells[place].dataset.value ?? "";
        const rows = [...body.rows].sort((a, b) => {
          const [x, y] = [key(a), key(b)];
          if (x === "" || y === "") return (x === "") - (y === "");
          const numbers = x !== "" && y !== "" && !Number.isNaN(Number(x)) && !Number.isNaN(Number(y));
          const order = numbers ? Number(x) - Number(y) : x.localeCompare(y);
          return descending ? -order : order;
        });
        body.append(...rows);
      });
    });
  });
  all("input[data-filter]").forEach((box) => box.addEventListener("input", () => {
    const words = box.value.toLowerCase().split(/\s+/).filter(Boolean);
    all("tbody tr", document.getElementById(box.dataset.filter)).forEach((row) => {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
    });
  }));
  all("[data-deltas]").forEach((button) => button.addEventListener("click", () => {
    const on = document.getElementById(button.dataset.deltas).classList.toggle("deltas");
    button.setAttribute("aria-pressed", String(on));
  }));

  // On paper everything is open.
  let closed = [];
  addEventListener("beforeprint", () => {
    closed = all("details:not([open])");
    closed.forEach((details) => { details.open = true; });
  });
  addEventListener("afterprint", () => closed.forEach((details) => { details.open = false; }));

  all("[data-copy]").forEach((button) => button.addEventListener("click", async () => {
    const text = document.getElementById(button.dataset.copy).textContent;
    try {
      await navigator.clipboard.writeText(text);
    } catch {
      const selection = getSelection();
      selection.selectAllChildren(document.getElementById(button.dataset.copy));
      document.execCommand("copy");
    }
    button.textContent = "Copied";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));
})();
