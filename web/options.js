/** The words for the options of inputs: in the user's language, which ComfyUI can't do, and for a LoRA that isn't there yet. */

import { app } from "../../scripts/app.js"
import { say, sayName } from "./words.js"

const LORA = "lora_name", CONNECTED = "(the connected LoRA)"
/** Inputs whose options are files, of which only those in brackets have other words. */
const FILES = new Set([LORA, "folder"])

function label(node, { name, options }, value) {
  const isConnected = node.inputs?.some((input) => input.name === "lora" && input.link != null)
  if (name === LORA && (!value || value === CONNECTED) && !isConnected)
    return options.values.some((one) => one !== CONNECTED) ? say("Choose a LoRA") : say("No LoRA yet. Put a file into models/loras, then press R")
  return FILES.has(name) && !value?.startsWith("(") ? value : sayName(value)
}

app.registerExtension({
  name: "facelora.options",
  nodeCreated(node) {
    if (!node.comfyClass?.startsWith("FaceLoRA")) return
    for (const widget of node.widgets ?? [])
      if (Array.isArray(widget.options?.values)) widget.options.getOptionLabel = (value) => label(node, widget, value)
  },
})
