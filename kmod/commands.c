// SPDX-License-Identifier: GPL-2.0-only
/*
 * The Generic Netlink family: its groups, its commands and their answers.
 * Initial network namespace only, CAP_NET_ADMIN for everything.
 */
#include <linux/module.h>
#include <linux/slab.h>
#include <net/genetlink.h>
#include <net/sock.h>

#include "alive.h"
#include "batch.h"
#include "commands.h"
#include "compat.h"
#include "config.h"
#include "events.h"
#include "holders.h"
#include "listen.h"
#include "netlink.h"
#include "owner.h"
#include "probes.h"
#include "process.h"

#define COMMANDS_HOLDERS_MAX	256	/* holders listed for one socket */

static struct genl_family commands_family;

/* Answers a command with one or two attributes. */
static int commands_reply(struct genl_info *info, int attr, const void *data, size_t len,
			 int attr2, const void *data2, size_t len2)
{
	struct sk_buff *skb;
	void *head;

	skb = genlmsg_new(nla_total_size(len) + nla_total_size(len2), GFP_KERNEL);
	if (!skb)
		return -ENOMEM;
	head = genlmsg_put_reply(skb, info, &commands_family, 0, info->genlhdr->cmd);
	if (!head || nla_put(skb, attr, len, data) ||
	    (attr2 && nla_put(skb, attr2, len2, data2))) {
		nlmsg_free(skb);
		return -EMSGSIZE;
	}
	genlmsg_end(skb, head);
	return genlmsg_reply(skb, info);
}

static int commands_get_info(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_info about = {
		.version = SNIFFER_VERSION,
		.record_size = sizeof(struct sniffer_record),
		.instance = sniffer_batch_instance(),
		.batch = sniffer_config_batch(),
		.flush_ms = sniffer_config_flush_ms(),
		.max_sockets = sniffer_owner_max(),
		.sockets = sniffer_owner_count(),
		.processes = sniffer_process_count(),
		.probes_registered = sniffer_probes_registered(),
		.probes_firing = sniffer_probes_firing(),
		.canary = sniffer_probes_alive(),
	};

	return commands_reply(info, SNIFFER_A_INFO, &about, sizeof(about), 0, NULL, 0);
}

static int commands_get_counters(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_counters counters;

	sniffer_batch_counters(&counters);
	counters.table_full = sniffer_owner_full();
	counters.process_lost = sniffer_events_lost();
	return commands_reply(info, SNIFFER_A_COUNTERS, &counters, sizeof(counters), 0, NULL, 0);
}

static int commands_set_config(struct sk_buff *skb, struct genl_info *info)
{
	unsigned int size = sniffer_config_batch(), interval = sniffer_config_flush_ms();

	if (info->attrs[SNIFFER_A_BATCH])
		size = nla_get_u32(info->attrs[SNIFFER_A_BATCH]);
	if (info->attrs[SNIFFER_A_FLUSH_MS])
		interval = nla_get_u32(info->attrs[SNIFFER_A_FLUSH_MS]);
	if (size < 1 || size > SNIFFER_BATCH_MAX) {
		GENL_SET_ERR_MSG(info, "batch must be 1 to 252 records");
		return -ERANGE;
	}
	if (interval < 1 || interval > SNIFFER_FLUSH_MS_MAX) {
		GENL_SET_ERR_MSG(info, "flush interval must be 1 to 1000 ms");
		return -ERANGE;
	}
	sniffer_config_set(size, interval);
	return commands_get_info(skb, info);
}

static int commands_flush(struct sk_buff *skb, struct genl_info *info)
{
	unsigned int count = num_possible_cpus();
	struct sniffer_flow_tail *flows;
	struct sniffer_tail *tails;
	int err = -ENOMEM;

	/* FLUSH is the first command of a reader that has joined */
	sniffer_listen_update();
	tails = kvcalloc(count, sizeof(*tails), GFP_KERNEL);
	flows = kvcalloc(count, sizeof(*flows), GFP_KERNEL);
	if (tails && flows) {
		count = sniffer_batch_flush(tails, flows, count);
		err = commands_reply(info, SNIFFER_A_TAILS, tails, count * sizeof(*tails),
				     SNIFFER_A_FLOW_TAILS, flows, count * sizeof(*flows));
	}
	kvfree(tails);
	kvfree(flows);
	return err;
}

/* Under RCU. */
static void commands_describe_socket(struct sniffer_owner *owner, struct sniffer_socket *out)
{
	const struct sniffer_proc *user = rcu_dereference(owner->user);

	memset(out, 0, sizeof(*out));
	out->cookie = owner->cookie;
	out->inode = owner->inode;
	out->creator = owner->creator;
	out->creator_start_ns = owner->creator_start;
	out->netns = owner->netns;
	out->flags = READ_ONCE(owner->flags);
	if (READ_ONCE(owner->dead) && !READ_ONCE(owner->via))
		out->flags |= SNIFFER_F_DEAD;
	if (READ_ONCE(owner->server) && !user)
		out->flags |= SNIFFER_F_KERNEL;
	out->family = owner->family;
	out->proto = owner->proto;
	out->sport = owner->port;
	memcpy(out->saddr, owner->addr, sizeof(out->saddr));
	if (user) {
		out->tgid = user->tgid;
		out->start_ns = user->start_ns;
		out->uid = READ_ONCE(user->uid);
		out->tid = READ_ONCE(owner->tid);
		memcpy(out->comm, user->comm, SNIFFER_COMM_LEN);
	}
}

/* Process context. */
static void commands_add_holders(struct sniffer_socket *out, struct sniffer_holder *holders,
				unsigned int max)
{
	out->holders = sniffer_holders_list(out->cookie, holders, max);
	if (out->holders > 1)
		out->flags |= SNIFFER_F_SHARED;
}

static int commands_get_socket(struct sk_buff *skb, struct genl_info *info)
{
	struct sniffer_socket socket;
	struct sniffer_holder *holders;
	struct sniffer_owner *owner;
	int err = -ENOENT;

	if (!info->attrs[SNIFFER_A_COOKIE]) {
		GENL_SET_ERR_MSG(info, "attribute SNIFFER_A_COOKIE is missing");
		return -EINVAL;
	}
	holders = kcalloc(COMMANDS_HOLDERS_MAX, sizeof(*holders), GFP_KERNEL);
	if (!holders)
		return -ENOMEM;
	rcu_read_lock();
	owner = sniffer_owner_find(nla_get_u64(info->attrs[SNIFFER_A_COOKIE]));
	if (owner)
		commands_describe_socket(owner, &socket);
	rcu_read_unlock();
	if (owner) {
		commands_add_holders(&socket, holders, COMMANDS_HOLDERS_MAX);
		err = commands_reply(info, SNIFFER_A_SOCKET, &socket, sizeof(socket),
				    SNIFFER_A_HOLDERS, holders,
				    min_t(u32, socket.holders, COMMANDS_HOLDERS_MAX) *
				    sizeof(*holders));
	}
	kfree(holders);
	return err;
}

/* cb->args says where a dump stands: the bucket, and the index in it. */
static int commands_dump_sockets(struct sk_buff *skb, struct netlink_callback *cb)
{
	unsigned int bucket = cb->args[0], index = cb->args[1];
	struct sniffer_holder holders[8];
	struct sniffer_socket socket;
	struct sniffer_owner *owner;
	unsigned int count;
	void *head;

	cb->seq = sniffer_owner_generation();
	for (;;) {
		rcu_read_lock();
		owner = sniffer_owner_next(&bucket, &index);
		if (owner)
			commands_describe_socket(owner, &socket);
		rcu_read_unlock();
		if (!owner)
			break;
		commands_add_holders(&socket, holders, ARRAY_SIZE(holders));
		count = min_t(u32, socket.holders, ARRAY_SIZE(holders));
		head = genlmsg_put(skb, NETLINK_CB(cb->skb).portid, cb->nlh->nlmsg_seq,
				   &commands_family, NLM_F_MULTI, SNIFFER_CMD_GET_SOCKET);
		if (!head || nla_put(skb, SNIFFER_A_SOCKET, sizeof(socket), &socket) ||
		    nla_put(skb, SNIFFER_A_HOLDERS, count * sizeof(*holders), holders)) {
			if (head)
				genlmsg_cancel(skb, head);
			index--;
			break;
		}
		genl_dump_check_consistent(cb, head);
		genlmsg_end(skb, head);
	}
	cb->args[0] = bucket;
	cb->args[1] = index;
	return skb->len;
}

static int commands_dump_processes(struct sk_buff *skb, struct netlink_callback *cb)
{
	unsigned int bucket = cb->args[0], index = cb->args[1];
	struct sniffer_process process;
	struct sniffer_proc *proc;
	void *head;

	cb->seq = sniffer_process_generation();
	rcu_read_lock();
	while ((proc = sniffer_process_next(&bucket, &index))) {
		sniffer_process_describe(proc, SNIFFER_EVENT_DUMP, &process);
		head = genlmsg_put(skb, NETLINK_CB(cb->skb).portid, cb->nlh->nlmsg_seq,
				   &commands_family, NLM_F_MULTI, SNIFFER_CMD_GET_PROCESS);
		if (!head || nla_put(skb, SNIFFER_A_PROCESS, SNIFFER_PROCESS_NO_START, &process)) {
			if (head)
				genlmsg_cancel(skb, head);
			index--;
			break;
		}
		genl_dump_check_consistent(cb, head);
		genlmsg_end(skb, head);
	}
	rcu_read_unlock();
	cb->args[0] = bucket;
	cb->args[1] = index;
	return skb->len;
}

static const struct nla_policy commands_policy[SNIFFER_A_PAD + 1] = {
	[SNIFFER_A_COOKIE] = { .type = NLA_U64 },
	[SNIFFER_A_BATCH] = { .type = NLA_U32 },
	[SNIFFER_A_FLUSH_MS] = { .type = NLA_U32 },
};

static const struct genl_ops commands_ops[] = {
	{
		.cmd = SNIFFER_CMD_GET_INFO,
		.flags = GENL_ADMIN_PERM,
		.doit = commands_get_info,
	}, {
		.cmd = SNIFFER_CMD_GET_COUNTERS,
		.flags = GENL_ADMIN_PERM,
		.doit = commands_get_counters,
	}, {
		.cmd = SNIFFER_CMD_SET_CONFIG,
		.flags = GENL_ADMIN_PERM,
		.doit = commands_set_config,
	}, {
		.cmd = SNIFFER_CMD_FLUSH,
		.flags = GENL_ADMIN_PERM,
		.doit = commands_flush,
	}, {
		.cmd = SNIFFER_CMD_GET_SOCKET,
		.flags = GENL_ADMIN_PERM,
		.doit = commands_get_socket,
		.dumpit = commands_dump_sockets,
	}, {
		.cmd = SNIFFER_CMD_GET_PROCESS,
		.flags = GENL_ADMIN_PERM,
		.dumpit = commands_dump_processes,
	},
};

static const struct genl_multicast_group commands_groups[] = {
	[SNIFFER_GROUP_INDEX_PACKETS] = {
		.name = SNIFFER_GROUP_PACKETS, .flags = SNIFFER_GROUP_FLAGS,
	},
	[SNIFFER_GROUP_INDEX_PROCESSES] = {
		.name = SNIFFER_GROUP_PROCESSES, .flags = SNIFFER_GROUP_FLAGS,
	},
	[SNIFFER_GROUP_INDEX_SNAPS] = {
		.name = SNIFFER_GROUP_SNAPS, .flags = SNIFFER_GROUP_FLAGS,
	},
	[SNIFFER_GROUP_INDEX_FLOWS] = {
		.name = SNIFFER_GROUP_FLOWS, .flags = SNIFFER_GROUP_FLAGS,
	},
};

static struct genl_family commands_family __ro_after_init = {
	.name = SNIFFER_FAMILY,
	.version = SNIFFER_VERSION,
	.maxattr = SNIFFER_A_PAD,
	.policy = commands_policy,
	.module = THIS_MODULE,
	.ops = commands_ops,
	.n_ops = ARRAY_SIZE(commands_ops),
	.mcgrps = commands_groups,
	.n_mcgrps = ARRAY_SIZE(commands_groups),
	SNIFFER_RESV_START_OP(SNIFFER_CMD_UNSPEC + 1)
};

int sniffer_commands_init(void)
{
	int err;

	sniffer_netlink_init(&commands_family);
	err = genl_register_family(&commands_family);
	if (err == -EEXIST)
		pr_err("sniffer: another Generic Netlink family \"%s\" exists\n", SNIFFER_FAMILY);
	return err;
}

/* Probes and hooks are gone: no new events. */
void sniffer_commands_exit(void)
{
	sniffer_events_exit();
	genl_unregister_family(&commands_family);
}
