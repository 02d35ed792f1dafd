/** This pack's templates, in the order of their numbers, with a base model to download for users who have none. */

import { api } from "../../scripts/api.js"
import { app } from "../../scripts/app.js"

const pack = decodeURIComponent(new URL(".", import.meta.url).pathname.split("/").at(-2))
const unsorted = api.getWorkflowTemplates // in the order of the disk

api.getWorkflowTemplates = async function () {
  const templates = await unsorted.apply(this, arguments)
  templates[pack]?.sort()
  return templates
}

const LOADER = "CheckpointLoaderSimple"

// The templates name no checkpoint, so that they open with the user's first. Without any, the frontend offers the download.
app.registerExtension({
  name: "facelora.templates",
  async beforeConfigureGraph(graph) {
    const [choices, more] = LiteGraph.registered_node_types[LOADER].nodeData.input.required.ckpt_name
    if ((Array.isArray(choices) ? choices : more.options).length) return
    for (const node of graph.nodes) {
      const wanted = node.properties?.models?.[0]?.name
      if (node.type === LOADER && wanted && !node.widgets_values?.length) node.widgets_values = [wanted]
    }
  },
})
