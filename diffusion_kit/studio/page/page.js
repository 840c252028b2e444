// Keys: Ctrl+Enter starts, Esc cancels, in the tab that is open. A picture dropped beside the fields restores its settings.
(() => {
  const press = (end) => {
    const found = [...document.querySelectorAll(`button[id$="-${end}"]`)].filter((own) => own.offsetParent !== null);
    found[0]?.click();
  };
  document.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) {
      event.preventDefault();
      document.activeElement?.blur(); // a number that is being written counts
      setTimeout(() => press("go"), 50);
    } else if (event.key === "Escape" && !event.target.closest?.("[role=combobox], [role=listbox], [role=dialog], dialog")) {
      press("cancel");
    }
  });
  const isField = (target) => target.closest?.("input, textarea, .easel, .image-container, .upload-container, canvas");
  const isFile = (event) => [...(event.dataTransfer?.types ?? [])].includes("Files");
  document.addEventListener("dragover", (event) => {
    if (!isFile(event) || isField(event.target)) return;
    event.preventDefault();
    document.body.classList.add("dropping");
  });
  document.addEventListener("dragleave", (event) => {
    if (event.relatedTarget === null) document.body.classList.remove("dropping");
  });
  // First of all: fields keep what is dropped on them to themselves.
  document.addEventListener("drop", () => document.body.classList.remove("dropping"), true);
  document.addEventListener("drop", (event) => {
    const file = event.dataTransfer?.files?.[0];
    const input = document.querySelector("#restore input[type=file]");
    if (!file || !input || isField(event.target)) return;
    event.preventDefault();
    const files = new DataTransfer();
    files.items.add(file);
    input.files = files.files;
    input.dispatchEvent(new Event("change", { bubbles: true }));
  });
})();
