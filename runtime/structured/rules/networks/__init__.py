"""Rules whose texts are ways through a network: choices, paths of a knowledge graph, plans."""
