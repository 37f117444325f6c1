document.getElementById("download").addEventListener("click", function () {
  const numbers = document.getElementById("numbers").textContent;
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([numbers], { type: "application/json" }));
  link.download = "numbers.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
