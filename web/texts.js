/** Keeps text fields of several lines low, so that the node has room for its panel. */

import { app } from "../../scripts/app.js"

const HEIGHT = 64 // in pixels

app.registerExtension({
  name: "facelora.texts",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("FaceLoRA")) return
    for (const widget of node.widgets ?? [])
      if (widget.element?.tagName === "TEXTAREA")
        Object.assign(widget.options, { getMinHeight: () => HEIGHT, getMaxHeight: () => HEIGHT })
  },
})
