/** Tells why a run failed: in the panels, and for nodes of this pack in a toast. ComfyUI's app mode only shows that it did. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"
import { saySentence } from "./words.js"

/** The event with the reason why a run failed, and its prompt: {text, prompt}. The text is "" when another run is queued. */
export const FAILURE = "facelora.failure"
const tell = (text, prompt) => document.dispatchEvent(new CustomEvent(FAILURE, { detail: { text, prompt } }))

const titleOf = (id, type) => app.rootGraph.getNodeById(id)?.title ?? LiteGraph.registered_node_types[type]?.title ?? type

app.registerExtension({
  name: "facelora.failures",
  setup() {
    api.addEventListener("execution_error", ({ detail: { prompt_id, node_id, node_type, exception_message } }) => {
      const summary = titleOf(node_id, node_type), detail = saySentence(exception_message.trim())
      const [id, ...inner] = String(node_id).split(":"), node = app.rootGraph.getNodeById(id)
      const isHere = node && (inner.length || node.type === node_type) // and not in another tab
      if (isHere) tell(`${summary}: ${detail}`, prompt_id)
      if (node_type?.startsWith("FaceLoRA")) app.extensionManager.toast.add({ severity: "error", summary, detail, life: 15000 })
    })
    const queue = api.queuePrompt
    api.queuePrompt = async function () {
      tell("")
      try {
        return await queue.apply(this, arguments)
      } catch (problem) {
        const nodes = Object.entries(problem.response?.node_errors ?? {})
        tell(nodes.flatMap(([id, { class_type, errors }]) =>
          errors.map(({ message, details }) => `${titleOf(id, class_type)}: ${message} ${details}`)).join("\n"))
        throw problem
      }
    }
  },
})
