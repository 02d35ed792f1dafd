/** The model files that a workflow's loaders don't have: ComfyUI lists them in the graph, but not in its app mode. */

import { app } from "../../scripts/app.js"
import { make } from "./dom.js"
import { say } from "./words.js"

/** The files that the nodes' `models` offer, as {name, directory, url}, and that a widget names but cannot choose. */
function lacking() {
  const nodes = (app.rootGraph ?? app.graph)?.nodes ?? []
  return nodes.flatMap(({ properties, widgets = [] }) => (properties?.models ?? []).filter(({ name }) =>
    widgets.some(({ value, options }) => value === name && Array.isArray(options?.values) && !options.values.includes(name))))
}

/** Lists them in an element, each as a link to download it. Returns whether there are any. */
export function missingFiles(element) {
  const files = lacking()
  const rows = files.map(({ name, directory, url }) =>
    make("div", "", Object.assign(make("a", "", `${directory}/${name}`), { href: url, target: "_blank", rel: "noreferrer" })))
  element.replaceChildren(say("Missing files. Download them into ComfyUI's models folder, then press R:"), ...rows)
  return files.length > 0
}
