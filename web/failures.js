/** Shows why a node of this pack failed, because ComfyUI's app mode only shows that it did. */

import { app } from "../../scripts/app.js"
import { api } from "../../scripts/api.js"

app.registerExtension({
  name: "facelora.failures",
  setup() {
    api.addEventListener("execution_error", ({ detail }) => {
      if (!detail.node_type?.startsWith("FaceLoRA")) return
      const summary = app.graph.getNodeById(detail.node_id)?.title ?? LiteGraph.registered_node_types[detail.node_type]?.title
      app.extensionManager.toast.add({ severity: "error", summary, detail: detail.exception_message.trim(), life: 15000 })
    })
  },
})
