"""Attribution of other people's models: registered adapters, block lists, wiring and the engines that drive them."""
