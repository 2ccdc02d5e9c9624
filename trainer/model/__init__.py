"""The architecture: Megatron's embedding, parallel linears, block and layer, with this project's modules in their slots."""
