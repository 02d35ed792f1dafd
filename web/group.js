/** The inputs of Group Portrait, counted from 1 as people count. Their names count from 0, and saved workflows have those. */

import { app } from "../../scripts/app.js"
import { after } from "./dom.js"
import { say } from "./words.js"

app.registerExtension({
  name: "facelora.group",
  nodeCreated(node) {
    if (node.comfyClass !== "FaceLoRAGroup") return
    const label = () => {
      for (const input of node.inputs) {
        const [, number] = /^people\.person(\d+)$/.exec(input.name) ?? []
        if (number) input.label = say("person {}", Number(number) + 1)
      }
    }
    after(node, "onConnectionsChange", () => requestAnimationFrame(label)) // the frontend adds an input after this
    after(node, "onConfigure", label)
    after(node, "onSerialize", ({ inputs }) => inputs.forEach((input) => input.name.startsWith("people.") && delete input.label))
    label()
  },
})
