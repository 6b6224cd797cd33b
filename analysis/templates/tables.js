// The results sort and filter by DataTables, which stands packed in the page: it opens without a network.
const unpacked = async (base64, type) => {
  const { body } = await fetch(`data:;base64,${base64}`);
  const headers = { "content-type": type };
  return new Response(body.pipeThrough(new DecompressionStream("gzip")), { headers }).blob();
};
const packed = id => document.getElementById(id).textContent;
const style = document.createElement("style");
style.textContent = await (await unpacked(packed("dt_bundle.css"), "text/css")).text();
document.head.prepend(style); // the page's own rules come after, and win
const { default: DataTable } = await import(URL.createObjectURL(await unpacked(packed("dt_bundle.js"), "text/javascript")));
new DataTable("#results-table", {
  paging: false,
  order: [],
  autoWidth: false,
  layout: { topStart: "info", topEnd: "search", bottomStart: null, bottomEnd: null },
  language: { info: "_TOTAL_ rows", infoFiltered: "of _MAX_", infoEmpty: "0 rows", search: "", searchPlaceholder: "search" },
  columnDefs: [{ targets: ".filters", columnControl: [{ extend: "dropdown", text: "filter", content: ["searchList"] }] }],
});
