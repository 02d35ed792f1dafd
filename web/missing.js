/** What a training run lacks: photos, words, and the model files of loaders, which ComfyUI lists in the graph but not in its app mode. */

import { app } from "../../scripts/app.js"
import { baseOf, feeding, widgetOf } from "./dom.js"
import { make } from "./elements.js"
import { say } from "./words.js"

const FEW = 10 // photos, which are enough to measure likeness

/** The files that the nodes' `models` offer, as {name, directory, url}, and that a widget names but cannot choose. */
function lackingFiles() {
  const nodes = (app.rootGraph ?? app.graph)?.nodes ?? []
  return nodes.flatMap(({ properties, widgets = [] }) => (properties?.models ?? []).filter(({ name }) =>
    widgets.some(({ value, options }) => value === name && Array.isArray(options?.values) && !options.values.includes(name))))
}

// say
const WORDS = { name: "a name", trigger_word: "a trigger word", class_word: "a class word" }

/** What a training run needs and a Train Face LoRA doesn't have yet, in words. */
export function lacking(train) {
  const texts = Object.keys(WORDS).filter((name) => !String(widgetOf(train, name).value).trim()).map((name) => say(WORDS[name]))
  const hasModel = !feeding(train, "model") || baseOf(train)
  const hasPhotos = feeding(train, "photos")?.comfyClass !== "FaceLoRALoadPhotos" || photosOf(train)
  return [...(hasPhotos ? [] : [say("10 to 20 photos")]), ...(hasModel ? [] : [say("a base model")]), ...texts]
}

/** The number of photos for a Train Face LoRA: those added, or as many as a folder may have; 0 if there are none. */
export function photosOf(train) {
  const photos = feeding(train, "photos")
  if (photos?.comfyClass !== "FaceLoRALoadPhotos") return FEW
  const added = widgetOf(photos, "pictures").value.split("\n").filter((name) => name.trim()).length
  return added || (widgetOf(photos, "folder").value === "(no folder)" ? 0 : FEW)
}

/** Lists them in an element, each as a link to download it. Returns whether there are any. */
export function missingFiles(element) {
  const files = lackingFiles()
  const rows = files.map(({ name, directory, url }) =>
    make("div", "", Object.assign(make("a", "", `${directory}/${name}`), { href: url, target: "_blank", rel: "noreferrer" })))
  element.replaceChildren(say("Missing files. Download them into ComfyUI's models folder, then press R:"), ...rows)
  return files.length > 0
}
