// Cells of a spreadsheet that are pasted into the grid: gradio's own takes none. They go where a cell was clicked last.
let at = null;
const cellOf = (node) => node?.closest?.("#grid [data-testid^='cell-']");
const placeOf = (cell) => cell.dataset.testid.split("-").slice(1).map(Number);

document.addEventListener("mousedown", (event) => {
  const cell = cellOf(event.target);
  at = cell ? placeOf(cell) : event.target.closest?.("#grid") ? [0, 0] : null;
}, true);
document.addEventListener("paste", (event) => {
  const cell = cellOf(document.activeElement);
  const [row, column] = cell ? placeOf(cell) : at ?? [-1, -1];
  const text = event.clipboardData?.getData("text/plain") ?? "";
  const typed = event.target.matches?.("input, textarea") && !/[\t\n]/.test(text.trim());
  if (row < 0 || !text || typed) return; // a single value goes where the cursor is
  event.preventDefault();
  event.stopPropagation();
  props.value = JSON.stringify({ row, column, text, at: Date.now() });
  trigger("input");
}, true);
