/* SPDX-License-Identifier: GPL-2.0-only */
#ifndef SNIFFER_HOLDERS_H
#define SNIFFER_HOLDERS_H

#include <linux/types.h>

#include "shared_proto.h"

struct sniffer_proc;

void sniffer_holders_settle(u64 cookie);
void sniffer_holders_settle_process(struct sniffer_proc *proc);
void sniffer_holders_settle_later(u64 cookie, struct sniffer_proc *proc);
unsigned int sniffer_holders_list(u64 cookie, struct sniffer_holder *out, unsigned int max);
void sniffer_holders_exit(void);

#endif /* SNIFFER_HOLDERS_H */
