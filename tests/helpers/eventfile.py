"""Read TensorBoard's event files without TensorBoard.

tensorboardX is imported when a function is called: pytest imports every helper to look for
doctests, also where the extra is not installed.
"""

from importlib import import_module


def events(directory):
    """Every event in the files of a directory, in the order in which they were written.

    A file is frames of a length in 8 bytes, a checksum in 4, the event, and a checksum in 4.
    """
    event = import_module("tensorboardX.proto.event_pb2").Event
    for file in sorted(directory.glob("*tfevents*")):
        data, at = file.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            yield event.FromString(data[at + 12 : at + 12 + size])
            at += size + 16


def values(directory):
    """What there is by tag, as a list of `(step, value)`."""
    found = {}
    for event in events(directory):
        for value in event.summary.value:
            kind = value.WhichOneof("value")
            found.setdefault(value.tag, []).append((event.step, getattr(value, kind)))
    return found


def graph(directory):
    """The nodes of the only graph by name; each one stands after those that it comes from."""
    graph_def = import_module("tensorboardX.proto.graph_pb2").GraphDef
    (found,) = [event.graph_def for event in events(directory) if event.graph_def]
    nodes = {}
    for node in graph_def.FromString(found).node:
        assert node.name not in nodes
        assert {source.split(":")[0] for source in node.input} <= nodes.keys()
        nodes[node.name] = node
    return nodes
