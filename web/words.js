/** The texts of the widgets, in English or in the language of ComfyUI's settings if it is here. */

import { app } from "../../scripts/app.js"
import { NAMES, SENTENCES } from "./zh.js"

const ZH = {
  // Train Face LoRA
  "Loss, samples and likeness appear here during training.": "训练时，损失、样图和相似度会显示在这里。",
  "{}: {} steps × {}, rank {}, learning rate {}, {} px": "{}：{} 步 × {} 张，秩 {}，学习率 {}，{} 像素",
  "This machine": "本机信息",
  "Show this machine's hardware and packages, as a report to paste into a question": "显示本机的硬件和软件包信息，提问时可以直接粘贴",
  "Trained people": "已训练的人物",
  "List all your training runs, to open or delete them": "列出你的所有训练，可以打开或删除",
  "No one has been trained yet.": "还没有训练过任何人。",
  "This training run was queued without a workflow.": "此训练不是从工作流提交的。",
  "training": "训练中",
  "drawing headshots": "正在生成形象照",
  "stopped": "已停止",
  "failed": "失败",
  "done": "已完成",
  "{} is missing. Run restores it in seconds": "缺少文件 {}。再次运行，几秒内即可恢复",
  "{} is missing. Run trains it again": "缺少文件 {}。再次运行会重新训练",
  "{} was trained by an older version. Run trains it again": "{} 由旧版本训练。再次运行会重新训练",
  "Choose a LoRA": "请选择 LoRA",
  "No LoRA yet. Put a file into models/loras, then press R": "还没有 LoRA。请将文件放入 models/loras，然后按 R",
  "Delete {}": "删除 {}",
  "Open": "打开",
  "Close": "关闭",
  "Delete": "删除",
  "Delete {}?": "要删除 {} 吗？",
  "Rename": "重命名",
  "Rename {}": "重命名 {}",
  "This deletes {}, {} headshots, {} dropped photos and cached files. Files that another training run uses are kept.": "这会删除 {}、{} 张形象照、{} 张拖入的照片，以及缓存文件。其他训练还在使用的文件会保留。",
  "No LoRA was made. This deletes {} dropped photos and cached files. Files that another training run uses are kept.": "这次训练没有生成 LoRA。这会删除 {} 张拖入的照片和缓存文件。其他训练还在使用的文件会保留。",
  "This deletes {} photos from ComfyUI's input folder.": "这会从 ComfyUI 的 input 文件夹中删除 {} 张照片。",
  "photos without a LoRA: {}": "没有 LoRA 的照片：{} 张",
  "no face": "没有人脸",
  "Stop and keep": "停止并保存",
  "End training now, draw and measure the last samples, and save the LoRA": "立即结束训练，生成最后的样图并测量相似度，然后保存 LoRA",
  "Cancel": "取消",
  "Cancelling": "正在取消",
  "End training without saving. Run it again to continue": "结束训练，不保存文件。重新运行即可从中断处继续",
  "{} or more: the same person. Below {}: someone else": "{} 及以上：同一个人。低于 {}：不是同一个人",
  "stopping after step {}": "第 {} 步后停止",
  "done: {}": "已完成：{}",
  "failed: {}": "失败：{}",
  "stopped. Run it again to continue": "已停止。重新运行即可继续",
  "waiting": "正在排队",
  "waiting, runs ahead in the queue: {}": "正在排队，前面的任务数：{}",
  "Missing files. Download them into ComfyUI's models folder, then press R:": "缺少以下文件。请下载到 ComfyUI 的 models 文件夹，然后按 R：",
  "Download all headshots": "下载全部形象照",
  "More like this one": "更多类似这张的图片",
  "Copy": "复制",
  "Copied": "已复制",
  "{}: {} of {}": "{}：{} / {}",
  "step {} of {}": "第 {} / {} 步",
  "step {}": "第 {} 步",
  "loss {}": "损失 {}",
  "learning rate {}": "学习率 {}",
  "likeness {}: {}": "相似度 {}：{}",
  "step {}, likeness {}: {}": "第 {} 步，相似度 {}：{}",
  "Train longer, or add more photos": "请增加训练步数，或添加更多照片",
  "the same person": "同一个人",
  "perhaps": "可能是",
  "someone else": "不是同一个人",
  "reading the model": "正在读取模型",
  "loading the model": "正在加载模型",
  "encoding": "正在编码",
  "class images": "正在生成类别图片",
  "samples": "样图",
  "drawing samples: {} %": "正在生成样图：{} %",
  "drawing the last samples: {} %": "正在生成最后的样图：{} %",
  "the rest of the workflow is running": "工作流的其余部分仍在运行",
  "samples, step {}": "样图，第 {} 步",
  "photos": "照片",
  "loss": "损失",
  "learning rate": "学习率",
  "likeness": "相似度",
  "{} s": "{} 秒",
  "{} min {} s": "{} 分 {} 秒",
  "{} h {} min": "{} 小时 {} 分",
  "{} left": "剩余 {}",
  "{} to {}": "{} 至 {}",
  "{} min": "{} 分钟",
  "{} h": "{} 小时",
  "Takes {} on this machine": "在本机上需要 {}",
  "Takes {} on this machine, and longer to redraw small faces": "在本机上需要 {}，重新生成小的脸还需要更多时间",
  "How long it takes on this machine is not known": "无法估计在本机上需要多长时间",
  "Still needed: {}": "还缺少：{}",
  ", ": "、",
  "10 to 20 photos": "10 到 20 张照片",
  "a base model": "基础模型",
  "a name": "名称",
  "a trigger word": "触发词",
  "a class word": "类别词",
  "Use step": "选用第几步的 LoRA",
  "Likeness {}. The next run outputs this step's LoRA, without training again": "相似度 {}。下次运行会直接输出这一步的 LoRA，不会重新训练",
  // Workflows of older versions
  "It replaces Save Image in this workflow of an older version: it saves each headshot once, and marks it as drawn.": "它取代了这个旧版工作流中的“保存图像”节点：每张形象照只保存一次，并标记为由程序生成。",
  "This app is from an older version.": "此应用来自旧版本。",
  "Open today's app with these values": "用这些值打开新版应用",
  // Load Face Photos
  "Add photos": "添加照片",
  "You can also drop or paste photos": "也可以直接拖入或粘贴照片",
  "Remove all": "全部移除",
  "Delete the files too?": "同时删除文件吗？",
  "Their copies are in ComfyUI's input folder. Photos that a training run uses are kept. To use photos again, choose their folder.": "照片的副本在 ComfyUI 的 input 文件夹中。训练正在使用的照片会保留。需要再次使用照片时，请选择它们所在的文件夹。",
  "Delete the files": "删除文件",
  "Keep the files": "保留文件",
  "checking": "正在检查",
  "✓ good": "✓ 合格",
  "! check": "! 请确认",
  "✕ left out": "✕ 不使用",
  "person {}": "人物 {}",
  "These photos show different people": "这些照片里不是同一个人",
  "Keep only these": "只保留这些",
  "Train on all photos": "使用全部照片训练",
  "uploading {} of {}": "正在上传 {} / {}",
  "{} added": "已添加 {} 张",
  "{} was already added": "{} 已经添加过",
  "or drop them here": "或把照片拖到这里",
  "Remove {}": "移除 {}",
  "Captions": "描述文字",
  "Caption": "描述文字",
  "{} is learnt as this person. Whatever else a caption names, such as clothes, is not.": "{} 会被学成这个人。描述中提到的其他内容（例如衣服）不会被学进去。",
  "The trigger word {} is missing": "缺少触发词 {}",
  // Apply LoRA
  "About this LoRA": "查看此 LoRA",
  "Show its model family, trigger words and training settings": "显示模型系列、触发词和训练设置",
  "Run the node first to see the connected LoRA": "请先运行节点，再查看所连接的 LoRA",
  // Labels in ComfyUI's app mode
  "Progress": "进度",
  "Base model": "基础模型",
  "Name": "名称",
  "Class word, e.g. woman": "类别词，例如 woman",
  "Train on": "用于训练的照片",
  "Or photos in a folder": "或选择照片文件夹",
  "Style pack": "风格包",
  "How many headshots": "形象照数量",
  "Recipe": "预设",
  "Strength": "强度",
  "Add to each prompt": "添加到每个提示词",
  "Seed, for other pictures": "种子（更改后会生成其他图片）",
  "More": "更多",
  "Recipe, strength, own words, seed": "预设、强度、自己的词、种子",
  "Redraw small faces": "重新生成小的脸",
  "Draws small faces again at a larger size. A picture with one takes about a third longer.": "以更大的尺寸重新生成小的脸，有小脸的图片生成时间约增加三分之一。",
  "Other pictures": "换一批图片",
  "Photos": "照片",
  "Styles": "风格",
}

export const inChinese = (text) => ZH[text]
const isChinese = () => app.extensionManager.setting.get("Comfy.Locale") === "zh"
const filled = (text, values) => text.replaceAll("{}", () => values.shift())

/** The text in the user's language. The values replace its {}, in their order. */
export const say = (text, ...values) => filled((isChinese() && ZH[text]) || text, values)

/** The name of an option or a style in the user's language. */
export const sayName = (name) => (isChinese() && NAMES[name]) || name

/** What the check of photos says, in the user's language. */
export function saySentence(sentence) {
  if (!isChinese() || !sentence) return sentence
  const patterns = Object.entries(SENTENCES).map(([text, chinese]) =>
    [new RegExp(`^${text.replace(/[.()]/g, "\\$&").replaceAll("{}", "(.+)")}$`), chinese])
  const part = (text) => {
    const [pattern, chinese] = patterns.find(([one]) => one.test(text)) ?? []
    return pattern ? filled(chinese, pattern.exec(text).slice(1).map(part)) : text
  }
  return sentence.split("; ").map(part).join("；")
}
