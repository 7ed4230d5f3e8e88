// Column heads sort their table: numbers with the largest first, words from A to Z, once more the other way round. Empty
// cells stay at the end.
for (const table of document.querySelectorAll("table")) {
  const body = table.tBodies[0];
  const heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => {
    const rows = () => [...body.rows];
    const numeric = rows().some((row) => row.cells[column].classList.contains("number"));
    if (numeric) head.classList.add("number");
    head.querySelector("button").addEventListener("click", () => {
      const was = head.getAttribute("aria-sort");
      const order = (was ? was === "descending" : !numeric) ? "ascending" : "descending";
      const sign = order === "ascending" ? 1 : -1;
      const value = (row) => row.cells[column].dataset.value ?? (numeric ? null : row.cells[column].textContent);
      const byNumber = numeric && rows().every((row) => value(row) === null || !Number.isNaN(Number(value(row))));
      const compare = (a, b) => {
        const [x, y] = [value(a), value(b)];
        if (x === null || y === null) return (x === null) - (y === null);
        return sign * (byNumber ? Number(x) - Number(y) : x.localeCompare(y, "en", { numeric: true }));
      };
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", order);
      body.append(...rows().sort(compare));
    });
  });
}
