// Shows a question as it was typed when it is edited, not the character references of the chat,
// which `escape_markup` makes.
const decode = (text) => text.replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(code));
new MutationObserver(() => {
  for (const area of document.querySelectorAll("#chat .edit-textarea:not([data-decoded])")) {
    area.dataset.decoded = "";
    area.value = decode(area.value);
    area.dispatchEvent(new Event("input"));
  }
}).observe(document.body, { childList: true, subtree: true });
