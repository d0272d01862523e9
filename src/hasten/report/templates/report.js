"use strict";
(() => {
  const all = (selector, root = document) => [...root.querySelectorAll(selector)];

  // --- table: each heading sorts; a third press brings back the order of the run ---
  const table = document.querySelector("#results");
  const body = table.tBodies[0];
  const inOrder = [...body.rows];
  const opposite = { ascending: "descending", descending: "ascending" };

  const valueOf = (row, column) => row.cells[column].dataset.value;

  function sortBy(column, direction) {
    const sign = direction === "ascending" ? 1 : -1;
    const rows = [...inOrder];
    if (direction) {
      rows.sort((a, b) => {
        const [x, y] = [valueOf(a, column), valueOf(b, column)];
        // What was not measured stays at the end, whichever way the rest is sorted.
        if (x === undefined || y === undefined) return (x === undefined) - (y === undefined);
        return sign * (column === 0 ? x.localeCompare(y, "en", { numeric: true }) : x - y);
      });
    }
    body.append(...rows);
  }

  for (const heading of all("thead th:not([data-fixed])", table)) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = heading.textContent;
    heading.replaceChildren(button);
    button.addEventListener("click", () => {
      const first = heading.dataset.first;
      const now = heading.getAttribute("aria-sort");
      const next = now === null ? first : now === first ? opposite[first] : null;
      for (const other of all("thead th", table)) other.removeAttribute("aria-sort");
      if (next) heading.setAttribute("aria-sort", next);
      sortBy(heading.cellIndex, next);
    });
  }

  // --- pictures: any two recipes, one over the other, or how they differ ---
  const tools = document.querySelector(".tools");
  if (!tools) return;
  tools.hidden = false;
  tools.addEventListener("submit", (event) => event.preventDefault());
  const { a: left, b: right, view, order } = tools.elements;
  const list = document.querySelector("#scenes");
  const scenes = all(".scene", list);
  const shotOf = (scene, recipe) =>
    all(".shot", scene).find((shot) => shot.dataset.recipe === recipe);
  const imageOf = (scene, recipe) => shotOf(scene, recipe)?.querySelector("img");

  // Equal pictures are embedded once; the others borrow the bytes here.
  for (const shot of all(".shot[data-same]", list)) {
    shot.querySelector("img").src = imageOf(shot.closest(".scene"), shot.dataset.same).src;
  }

  function moveDivider(scene, percent) {
    const range = scene.querySelector(".compare input");
    const value = Math.min(100, Math.max(0, Math.round(percent)));
    range.value = value;
    range.setAttribute("aria-valuetext", `${value} % ${left.value}`);
    scene.querySelector(".stage").style.setProperty("--split", `${value}%`);
  }

  function fill(image, from) {
    image.src = from.src;
    image.alt = from.alt;
  }

  function compare() {
    for (const scene of scenes) {
      const [before, after] = [imageOf(scene, left.value), imageOf(scene, right.value)];
      const box = scene.querySelector(".compare");
      box.hidden = !(before && after);
      for (const button of all(".shot button", scene)) {
        const recipe = button.closest(".shot").dataset.recipe;
        button.setAttribute("aria-pressed", String(recipe === right.value));
      }
      if (box.hidden) continue;
      fill(box.querySelector(".before"), before);
      fill(box.querySelector(".after"), after);
      const difference = view.value === "difference";
      box.classList.toggle("difference", difference);
      box.querySelector(".tag.left").textContent = left.value;
      box.querySelector(".tag.right").textContent = right.value;
      const range = box.querySelector("input");
      range.hidden = difference;
      const number = scene.querySelector(".number").textContent;
      range.setAttribute(
        "aria-label",
        `Prompt ${number}: divider between ${left.value} and ${right.value}`,
      );
      moveDivider(scene, range.valueAsNumber);
    }
    sort();
  }

  function sort() {
    const lpips = (scene) => Number.parseFloat(shotOf(scene, right.value)?.dataset.lpips) || 0;
    const worst = (a, b) => lpips(b) - lpips(a);
    list.append(...(order.value === "worst" ? [...scenes].sort(worst) : scenes));
  }

  for (const scene of scenes) {
    const stage = scene.querySelector(".stage");
    const range = scene.querySelector(".compare input");
    const follow = (event) => {
      const box = stage.getBoundingClientRect();
      moveDivider(scene, ((event.clientX - box.left) / box.width) * 100);
    };
    stage.addEventListener("pointerdown", (event) => {
      if (event.button !== 0) return;
      stage.setPointerCapture(event.pointerId);
      follow(event);
    });
    stage.addEventListener("pointermove", (event) => {
      if (stage.hasPointerCapture(event.pointerId)) follow(event);
    });
    range.addEventListener("input", () => moveDivider(scene, range.valueAsNumber));
    for (const button of all(".shot button", scene)) {
      button.addEventListener("click", () => {
        right.value = button.closest(".shot").dataset.recipe;
        compare();
      });
    }
  }
  tools.addEventListener("change", compare);
  compare();
})();
