"""The paper's recipe, which needs the network's gradient."""
