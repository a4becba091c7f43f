for (const head of document.querySelectorAll("thead th")) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = head.textContent;
  head.replaceChildren(button);
  button.addEventListener("click", () => {
    const up = head.getAttribute("aria-sort") === "descending", body = head.closest("table").tBodies[0];
    for (const other of head.parentNode.children) other.removeAttribute("aria-sort");
    head.setAttribute("aria-sort", up ? "ascending" : "descending");
    const key = row => row.cells[head.cellIndex].dataset.value, text = row => row.cells[head.cellIndex].textContent;
    const order = (a, b) => key(a) === undefined || key(b) === undefined
      ? (key(a) !== undefined ? -1 : key(b) !== undefined ? 1 : (up ? 1 : -1) * text(a).localeCompare(text(b)))
      : (up ? 1 : -1) * (key(a) - key(b));
    body.append(...[...body.rows].sort(order));
  });
}
