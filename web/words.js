/** What the widgets say, in English or in the language of ComfyUI's settings where it is here. */

import { app } from "../../scripts/app.js"

const ZH = {
  // Train Face LoRA
  "The training shows here: loss, samples, likeness.": "训练情况显示在这里：损失、样图、相似度。",
  "This machine": "本机",
  "What it has for training and what is missing, to paste into a question": "本机可用于训练的条件和缺少的组件，可粘贴到提问中",
  "Stop and keep": "停止并保留",
  "Ends the training now and keeps what it has learned": "立即结束训练，并保留已学到的内容",
  "Cancel": "取消",
  "Ends the training; queued again, it goes on from there": "结束训练；再次运行时从这里继续",
  "From {} on it is the same person, below {} someone else": "达到 {} 为同一个人，低于 {} 为别人",
  "ending after step {}, keeping what is learned": "第 {} 步后结束，保留已学到的内容",
  "done: {}": "完成：{}",
  "failed: {}": "失败：{}",
  "stopped; queued again, it goes on from there": "已停止；再次运行时从这里继续",
  "{}: {} of {}": "{}：{} / {}",
  "step {} of {}": "第 {} / {} 步",
  "step {}": "第 {} 步",
  "loss {}": "损失 {}",
  "rate {}": "学习率 {}",
  "likeness {}: {}": "相似度 {}：{}",
  "the same person": "同一个人",
  "perhaps": "也许是",
  "someone else": "别人",
  "reading the model": "读取模型",
  "encoding": "编码",
  "class images": "类别图片",
  "samples": "样图",
  "samples, step {}": "样图，第 {} 步",
  "photos": "照片",
  "loss": "损失",
  "learning rate": "学习率",
  "likeness": "相似度",
  "{} s": "{} 秒",
  "{} min {} s": "{} 分 {} 秒",
  "{} h {} min": "{} 小时 {} 分",
  "{} left": "剩余 {}",
  "Use the checkpoint of step": "使用这一步的检查点",
  "Likeness {}. The next run gives its LoRA, without training again": "相似度 {}。下次运行时给出它的 LoRA，不再训练",
  // Load Face Photos
  "Add photos": "添加照片",
  "Or drop them onto the node, or paste them": "也可以把照片拖到节点上，或粘贴",
  "Remove all": "全部移除",
  "The files stay in ComfyUI's input folder, where folder offers them": "文件仍在 ComfyUI 的输入文件夹中，可在“文件夹”中再次选择",
  "The photo was not uploaded": "照片未能上传",
  "uploading {} of {}": "正在上传 {} / {}",
  "{} added": "已添加 {} 张",
  "or drop them here": "或拖到这里",
  "Take out {}": "移除 {}",
  // Apply LoRA
  "About this LoRA": "关于此 LoRA",
  "What it is, its trigger words, how it was trained": "它是什么、触发词、训练设置",
  "The connected LoRA is known when the node has run": "节点运行后才知道所连接的 LoRA",
  // Above them in ComfyUI's app mode
  "Progress": "进度",
  "Photos": "照片",
  "Styles": "风格",
}

/** The text in the user's language, with the values in place of its {}, in their order. */
export function say(text, ...values) {
  const translated = app.extensionManager.setting.get("Comfy.Locale") === "zh" ? ZH[text] : undefined
  return (translated ?? text).replaceAll("{}", () => values.shift())
}
