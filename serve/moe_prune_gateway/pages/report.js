// The pruning report, inside a frame that runs no scripts. It is requested like data,
// since a frame could not send an API key.

import { $, fetchOk, chooseBackend, failed, markNav, notice } from "./common.js";

async function show() {
  markNav();
  notice("Loading the report");
  try {
    const { data } = await chooseBackend();
    const answer = await fetchOk(new URL("report", data));
    // As a blob, not as srcdoc: there, links within the report would lead to this page.
    const page = new Blob([await answer.text()], { type: "text/html; charset=utf-8" });
    $("report").src = URL.createObjectURL(page);
    $("report").hidden = false;
    $("notice").hidden = true;
  } catch (error) {
    failed(error.status === 404 ? "No report" : "The report cannot be shown", error);
  }
}

await show();
