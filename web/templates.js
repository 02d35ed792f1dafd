/** This pack's templates: in the order of their numbers, in the user's language, with a base model to download if there is none. */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"
import { after } from "./dom.js"
import { inChinese, say } from "./words.js"

/** The name of this pack's folder. */
export const pack = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2))
const unsorted = api.getWorkflowTemplates // in the order of the disk

api.getWorkflowTemplates = async function () {
  const templates = await unsorted.apply(this, arguments)
  templates[pack]?.sort()
  return templates
}

const LOADER = "CheckpointLoaderSimple"
/** The labels that the templates give to widgets, by widget. Files have them in English, and some of older versions in Chinese. */
// say
const LABELS = {
  ckpt_name: "Base model", unet_name: "Base model", name: "Name", class_word: "Class word, e.g. woman", use: "Train on",
  folder: "Or photos in a folder", pack: "Style pack", count: "How many headshots",
  recipe: "Recipe", strength_model: "Strength", extra: "Add to each prompt", first_seed: "Seed, for other pictures",
}

/** Labels the inputs that have one of these labels anew. */
function label(inputs, text) {
  for (const input of inputs ?? []) {
    const own = LABELS[input.name]
    if (own && [own, inChinese(own)].includes(input.label)) input.label = text(own)
  }
}

// The templates name no checkpoint, so that they open with the user's first. Without any, the frontend offers the download.
app.registerExtension({
  name: "facelora.templates",
  nodeCreated(node) {
    after(node, "onSerialize", ({ inputs }) => label(inputs, (own) => own))
  },
  async beforeConfigureGraph(graph) {
    for (const { inputs } of graph.nodes) label(inputs, say)
    const [choices, more] = LiteGraph.registered_node_types[LOADER].nodeData.input.required.ckpt_name
    if ((Array.isArray(choices) ? choices : more.options).length) return
    for (const node of graph.nodes) {
      const wanted = node.properties?.models?.[0]?.name
      if (node.type === LOADER && wanted && !node.widgets_values?.length) node.widgets_values = [wanted]
    }
  },
})
