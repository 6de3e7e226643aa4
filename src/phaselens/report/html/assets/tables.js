// Sortable and filterable tables: those of the page, and the result tables in the data.
const collator = new Intl.Collator("en", { numeric: true });

/** Compare two keys: numbers by size, text by its letters, missing values last in either direction. */
function compareKeys(first, second, direction) {
  if (first === "" || first === null) return second === "" || second === null ? 0 : 1;
  if (second === "" || second === null) return -1;
  const numbers = [Number(first), Number(second)];
  const order = numbers.some(Number.isNaN) ? collator.compare(first, second) : numbers[0] - numbers[1];
  return direction * order;
}

/** Sort by the column whose button was pressed: descending for numbers at first, then the other way. */
function nextDirection(header, startsWithNumber) {
  const state = header.getAttribute("aria-sort");
  const first = startsWithNumber ? "descending" : "ascending";
  const second = first === "descending" ? "ascending" : "descending";
  const next = state === "none" ? first : state === first ? second : "none";
  for (const other of $$("th[aria-sort]", header.parentElement)) other.setAttribute("aria-sort", "none");
  header.setAttribute("aria-sort", next);
  return next === "ascending" ? 1 : next === "descending" ? -1 : 0;
}

for (const table of $$("table.sortable")) {
  const body = table.tBodies[0];
  const original = [...body.rows];
  const header = table.tHead.rows[table.tHead.rows.length - 1];
  [...header.cells].forEach((cell, index) => {
    const button = $("button", cell);
    if (!button) return;
    button.addEventListener("click", () => {
      const keys = new Map(original.map((row) => [row, row.cells[index]?.dataset.key ?? ""]));
      const sample = [...keys.values()].find((key) => key !== "") ?? "";
      const direction = nextDirection(cell, sample !== "" && !Number.isNaN(Number(sample)));
      const rows = direction
        ? [...original].sort((a, b) => compareKeys(keys.get(a), keys.get(b), direction)) : original;
      body.append(...rows);
      announce(direction ? `Sorted by ${button.textContent}` : "Original order");
    });
  });
  const filter = $(".filter input", table.closest(".table-block"));
  if (filter) filter.addEventListener("input", () => {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let n = 0;
    for (const row of original) {
      const text = row.textContent.toLowerCase();
      row.hidden = !words.every((word) => text.includes(word));
      n += row.hidden ? 0 : 1;
    }
    announce(`${n} rows`);
  });
}

const PAGE = 100;

/** Build a browser of one result table: sorted, filtered, a hundred rows at a time, with a download as CSV. */
function tableBrowser(table) {
  const columns = table.columns.map((column) => ({
    ...column, cell: (row) => {
      const value = column.values[row];
      return column.words && value !== null ? column.words[value] : value;
    },
  }));
  let order = Array.from({ length: table.rows }, (_, row) => row);
  let shown = PAGE;
  let words = [];
  const body = element("tbody");
  const count = element("span", { "aria-live": "polite" });
  const more = element("button", { type: "button", onclick: () => { shown += 5 * PAGE; draw(); } }, "Show more");
  const head = element("tr", {}, ...columns.map((column) => {
    const button = element("button", { type: "button", title: column.help || false },
      column.unit ? `${column.name} (${column.unit})` : column.name);
    const cell = element("th", { scope: "col", "aria-sort": "none", class: column.words ? "left" : false }, button);
    button.addEventListener("click", () => {
      const direction = nextDirection(cell, !column.words);
      order = Array.from({ length: table.rows }, (_, row) => row);
      if (direction) order.sort((a, b) => compareKeys(column.cell(a), column.cell(b), direction));
      draw();
    });
    return cell;
  }));
  function draw() {
    const rows = words.length ? order.filter((row) => {
      const text = columns.map((column) => column.cell(row) ?? "").join(" ").toLowerCase();
      return words.every((word) => text.includes(word));
    }) : order;
    body.replaceChildren(...rows.slice(0, shown).map((row) => element("tr", {}, ...columns.map((column) =>
      element("td", { class: column.words ? "left" : false }, number(column.cell(row)))))));
    count.textContent = `${Math.min(shown, rows.length).toLocaleString("en")} of ${rows.length.toLocaleString("en")} rows`;
    more.hidden = shown >= rows.length;
  }
  const filter = element("input", {
    type: "search", placeholder: "Filter rows", autocomplete: "off", "aria-label": `Filter ${table.metric}.${table.name}`,
    oninput: (event) => { words = event.target.value.toLowerCase().split(/\s+/).filter(Boolean); draw(); },
  });
  const csv = element("button", { type: "button", onclick: () => {
    const quoted = (value) => {
      const text = value === null || value === undefined ? "" : String(value);
      return /[",\n]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
    };
    const lines = [columns.map((column) => quoted(column.name)).join(",")];
    for (const row of order) lines.push(columns.map((column) => quoted(column.cell(row))).join(","));
    download(`${table.metric}.${table.name}.csv`, "text/csv", lines.join("\n"));
  } }, "Download CSV");
  draw();
  return [
    element("div", { class: "pager" }, filter, csv, count, more),
    element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `Table ${table.metric}.${table.name}` },
      element("table", {}, element("thead", {}, head), body)),
  ];
}

for (const section of $$("section.metric")) {
  const tables = data.tables.filter((table) => table.metric === section.dataset.metric);
  const place = $(".data-tables", section);
  if (!tables.length) continue;
  place.hidden = false;
  place.append(element("h3", {}, "Result tables"), ...tables.map((table) => {
    const details = element("details", {}, element("summary", {},
      `${table.name}: ${table.help || "result table"} (${table.rows.toLocaleString("en")} rows)`));
    details.addEventListener("toggle", () => {
      if (details.open && details.children.length === 1) details.append(...tableBrowser(table));
    });
    return details;
  }));
}
