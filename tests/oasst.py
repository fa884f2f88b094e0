"""Ranked replies of Open Assistant's message trees as rows {prompt: [messages], responses, ranks}."""

import json


def rankings(path):
    """One row for each prompter's message with at least two assistant replies of known rank."""
    rows = []

    def walk(message, before):
        turn = {"role": "user" if message["role"] == "prompter" else "assistant", "content": message["text"]}
        conversation = [*before, turn]
        replies = message.get("replies") or []
        ranked = [reply for reply in replies if reply["role"] == "assistant" and reply.get("rank") is not None]
        if turn["role"] == "user" and len(ranked) > 1:
            texts, ranks = [reply["text"] for reply in ranked], [reply["rank"] for reply in ranked]
            rows.append({"prompt": conversation, "responses": texts, "ranks": ranks})
        for reply in replies:
            walk(reply, conversation)

    with open(path, encoding="utf-8") as file:
        for line in file:
            walk(json.loads(line)["prompt"], [])
    return rows
