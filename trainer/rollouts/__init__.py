"""On-policy samples: prompts, the student's answers, their scores by the teacher, rows to train on."""
