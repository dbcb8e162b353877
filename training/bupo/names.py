"""Names that several processes agree on."""

__all__ = ["AGENT", "ROLLOUT", "STOP_FILE", "WATCHED"]

#: The CPU's `actor_rollout_ref.rollout.name` and `.agent.default_agent_loop`.
ROLLOUT, AGENT = "hf_cpu", "bupo_keyed"
#: Whoever writes this file into a run's directory lets the run end after its step.
STOP_FILE = "stop"
#: Response positions a step at which the policy that is not trained is read.
WATCHED = 2048
