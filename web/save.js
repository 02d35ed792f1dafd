/** The placeholders in the file names of Save Headshots, such as %FaceLoRATrain.name%: the page replaces those of Save Image. A file's ending is left out. */

import { app } from "../../scripts/app.js"
import { widgetOf } from "./dom.js"

app.registerExtension({
  name: "facelora.save",
  nodeCreated(node) {
    if (node.comfyClass !== "FaceLoRASaveHeadshots") return
    const prefix = widgetOf(node, "filename_prefix")
    prefix.serializeValue = () => window.comfyAPI.utils.applyTextReplacements(app.graph, prefix.value).replaceAll(".safetensors", "")
  },
})
